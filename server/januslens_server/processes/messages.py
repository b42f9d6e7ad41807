"""What a member and the supervisor tell each other, over a pipe whose end is the end of either."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True)
class Loaded:
    """A member has loaded what it could: every model's name, and whether it can be served."""

    models: dict[str, bool]


@dataclass(frozen=True)
class Listening:
    """A member has opened the port."""


class Order(Enum):
    """What the supervisor has a member do; to end, it sends SIGTERM."""

    OPEN = auto()  # the port
    RELOAD = auto()  # the callers

"""A request on a device's thread."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from januslens_server.scheduling.outlet import Outlet
from januslens_server.scheduling.ticket import Ticket


@dataclass(eq=False)
class Job:
    """Its steps, where their results go, and whose it is.

    Between two steps it may be set aside. A step gives a result, or None if it has none yet.
    """

    steps: Iterator[Any]
    outlet: Outlet[Any]
    ticket: Ticket
    admitted: float = field(default_factory=time.monotonic)

    @property
    def caller(self) -> str:
        """Whose account it is charged to."""
        return self.ticket.caller

    @property
    def held(self) -> int:
        """Bytes of the device that it may keep between two steps, once it has started."""
        return self.ticket.cost.held

    @property
    def working(self) -> int:
        """Further bytes that it may need during a step."""
        return self.ticket.cost.memory - self.ticket.cost.held

    @property
    def remaining(self) -> float:
        """Seconds of the device that are still expected."""
        return max(0.0, self.ticket.cost.seconds - self.ticket.spent)

    def close(self) -> None:
        """Let go of what it has computed with."""
        if isinstance(self.steps, Generator):  # one that was stopped between two steps
            self.steps.close()

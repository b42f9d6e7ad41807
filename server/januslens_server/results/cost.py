"""What a request is expected to take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """An estimate: `seconds` of the device, `memory` on it and `stream` to the caller in bytes.

    `held` of the memory is kept between two steps, the rest is needed while a step computes.
    """

    seconds: float = 0.0
    memory: int = 0
    stream: int = 0
    held: int = 0

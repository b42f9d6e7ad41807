"""Measure the memory of a process, as Linux reports it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MIB = 2**20


class Memory:
    """The resident memory of one process, in bytes."""

    def __init__(self, process: int) -> None:
        self._folder = Path("/proc") / str(process)

    @property
    def resident(self) -> int:
        """The resident memory now."""
        return self._read("VmRSS")

    def peak(self, action: Callable[[], object]) -> int:
        """Return the peak memory of the process while `action` runs."""
        (self._folder / "clear_refs").write_text("5")  # forgets the peak so far
        action()
        return self._read("VmHWM")

    def _read(self, name: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        value = next(line for line in lines if line.startswith(f"{name}:"))
        return int(value.split()[1]) * 1024

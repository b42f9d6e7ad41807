"""Whose turn on the device it is, and when it gives way to another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from januslens_server.scheduling.fair_queue import FairQueue
from januslens_server.scheduling.job import Job

# Seconds that a request keeps the device before it gives way: short ones are never interrupted.
QUANTUM = 0.1


class Turns:
    """Requests that could compute at once: fairly between callers, within a bound of memory.

    What has started holds memory until it ends. So another starts only if its own estimate is free
    now, and if all that have started fit together, as estimated, into what was free before the
    first of them: what they hold, and what the largest of them works with. While the next one
    waits for memory, none behind it starts. Not thread-safe.
    """

    def __init__(self, free: Callable[[float], float]) -> None:
        """`free` measures the bytes that are free on the device, if so many are needed."""
        self._free = free
        self._free_before = 0.0  # bytes, when last nothing had started
        self._ready: FairQueue[Job] = FairQueue()
        self._started: set[Job] = set()

    def __iter__(self) -> Iterator[Job]:
        """All that wait for a turn, each caller's in order."""
        return iter(self._ready)

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def started(self) -> int:
        """How many have had a turn and have not ended."""
        return len(self._started)

    def has_started(self, job: Job) -> bool:
        """Whether it is one of them."""
        return job in self._started

    def add(self, job: Job) -> None:
        """Let a request wait; one that has started goes before its caller's others."""
        self._ready.add(job.caller, job, first=job in self._started)

    def remove(self, job: Job) -> None:
        """Take out one that waits."""
        self._ready.remove(job.caller, job)

    def take(self) -> Job | None:
        """The next one, which from now on holds its memory until it has `ended`.

        None: all that could come next must wait for memory.
        """
        job = self._next()
        if job is None:
            return None
        self._started.add(job)
        return self._ready.pop(job.caller)

    def take_unstartable(self) -> Job | None:
        """The next one, if no other holds memory and it still does not fit: it cannot run now."""
        if self._started or not len(self._ready):
            return None
        return self._ready.pop()

    def fits_alone(self, needed: float) -> float:
        """Bytes that a request may need if it runs while nothing else does."""
        return max(self._free_before, self._free(needed)) if self._started else self._free(needed)

    def ended(self, job: Job) -> None:
        """What it held is free."""
        self._started.discard(job)

    def charge(self, job: Job, seconds: float) -> None:
        """It has had the device for so long."""
        self._ready.charge(job.caller, seconds)

    def gives_way(self, job: Job, seconds: float) -> bool:
        """Whether one that has run for so long should let another caller's run."""
        if seconds < QUANTUM:
            return False
        following = self._next()
        return following is not None and self._ready.has_had_less(following.caller, job.caller)

    def _next(self) -> Job | None:
        """The first in order that has started or has room to; None: no one has."""
        one_may_start = True
        for caller in self._ready.in_order():
            job = self._ready.first(caller)
            if job in self._started or (one_may_start and self._has_room(job)):
                return job
            one_may_start = False
        return None

    def _has_room(self, job: Job) -> bool:
        needed = job.held + job.working
        free = self._free(needed)
        if not self._started:
            self._free_before = free
        together = {*self._started, job}
        held, working = sum(j.held for j in together), max(j.working for j in together)
        return needed <= free and held + working <= self._free_before

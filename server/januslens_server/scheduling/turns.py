"""Whose turn on the device it is, and when it gives way to another's."""

from __future__ import annotations

from collections.abc import Iterator

from januslens_server.scheduling.fair_queue import FairQueue
from januslens_server.scheduling.job import Job

# Seconds that a request keeps the device before it gives way: short ones are never interrupted.
QUANTUM = 0.1


class Turns:
    """Requests that could compute at once: fairly between callers, within a bound of memory.

    What has started holds memory until it ends. So another starts only while what all of them hold,
    and what the neediest works with, have room; who is next but finds none lets nobody start before
    it. Where all that have started wait for their readers, the next one starts nevertheless:
    readers do not hold the device. Not thread-safe.
    """

    def __init__(self, memory: float) -> None:
        """Requests that take turns may need so many bytes of the device together."""
        self._memory = memory
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

    def take(self) -> Job:
        """The next one, which from now on holds its memory until it has `ended`."""
        job = self._next() or self._ready.first(self._ready.in_order()[0])
        self._started.add(job)
        return self._ready.pop(job.caller)

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
        together = {*self._started, job}
        held, working = sum(j.held for j in together), max(j.working for j in together)
        return held + working <= self._memory

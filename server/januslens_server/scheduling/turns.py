"""Choose the job that runs next on the device, fairly among callers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from januslens_server.scheduling.job import Job

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Waiting items by caller; the caller who has had the least of the device is next.

    Every caller has an account of the seconds it was charged. A caller without waiting items
    restarts at the level of the caller served last, so idle time earns no credit. This is
    start-time fair queueing (Goyal, Vin & Cheng 1996), charged with what was really used. Not
    thread-safe.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._accounts: dict[str, float] = {}
        self._level = 0.0

    def __iter__(self) -> Iterator[T]:
        """All that wait, each caller's in order."""
        for items in self._waiting.values():
            yield from items

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, caller: str, item: T, *, first: bool = False) -> None:
        """Put an item behind the caller's others, or before them."""
        if caller not in self._waiting:
            self._waiting[caller] = deque()
            self._accounts[caller] = max(self._accounts.get(caller, 0.0), self._level)
        items = self._waiting[caller]
        (items.appendleft if first else items.append)(item)

    def in_order(self) -> list[str]:
        """The callers, the next one first; among equal ones the one who has waited longest."""
        return sorted(self._waiting, key=self._accounts.__getitem__)

    def first(self, caller: str) -> T:
        """A waiting caller's next item."""
        return self._waiting[caller][0]

    def pop(self, caller: str | None = None) -> T:
        """Take out the next item, or if a caller is given, that one's."""
        if caller is None:
            caller = self.in_order()[0]
        self._level = max(self._level, self._accounts[caller])
        item = self._waiting[caller].popleft()
        if self._waiting[caller]:
            # To the end of the order, so that equals take turns.
            self._waiting[caller] = self._waiting.pop(caller)
        self._tidy(caller)
        return item

    def remove(self, caller: str, item: T) -> None:
        """Take an item out; raises `ValueError` if it does not wait."""
        items = self._waiting.get(caller, deque())
        items.remove(item)
        self._tidy(caller)

    def charge(self, caller: str, seconds: float) -> None:
        """Charge a caller for seconds of the device."""
        self._accounts[caller] = max(self._accounts.get(caller, 0.0), self._level) + seconds

    def has_had_less(self, caller: str, than: str) -> bool:
        """Whether `caller` should have the device rather than the other."""
        account = self._accounts.get(caller, self._level)
        return account < self._accounts.get(than, self._level)

    def _tidy(self, caller: str) -> None:
        """Forget callers who have nothing waiting and would start at the level anyway."""
        if not self._waiting.get(caller):
            self._waiting.pop(caller, None)
        idle = [name for name in self._accounts if name not in self._waiting]
        for name in idle:
            if self._accounts[name] <= self._level:
                del self._accounts[name]


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
        """Mark a job as ended, so that its memory counts as free."""
        self._started.discard(job)

    def charge(self, job: Job, seconds: float) -> None:
        """Charge the caller of a job for seconds of the device."""
        self._ready.charge(job.caller, seconds)

    def gives_way(self, job: Job, seconds: float) -> bool:
        """Whether a request that has run for this long should pause for another caller's."""
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

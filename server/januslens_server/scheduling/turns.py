"""Choose the job that runs next on the device, fairly among callers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from januslens_server.scheduling.job import Job

T = TypeVar("T")

# Seconds of device time after which a request may be interrupted for another caller.
QUANTUM = 0.1


class FairQueue(Generic[T]):
    """Waiting items by caller; the caller with the least device time is next.

    Every caller has an account of the seconds that it was charged. A caller without waiting items
    restarts at the account of the caller served last, so idle time earns no credit. This is
    start-time fair queueing (Goyal, Vin & Cheng, 1996) with measured times. Not thread-safe.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._accounts: dict[str, float] = {}
        self._level = 0.0

    def __iter__(self) -> Iterator[T]:
        """All waiting items, those of each caller in order."""
        for items in self._waiting.values():
            yield from items

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, caller: str, item: T, *, first: bool = False) -> None:
        """Add an item after the caller's other items, or with `first` before them."""
        if caller not in self._waiting:
            self._waiting[caller] = deque()
            self._accounts[caller] = max(self._accounts.get(caller, 0.0), self._level)
        items = self._waiting[caller]
        (items.appendleft if first else items.append)(item)

    def in_order(self) -> list[str]:
        """Return the callers, the next one first; of equal callers, the one waiting longest."""
        return sorted(self._waiting, key=self._accounts.__getitem__)

    def first(self, caller: str) -> T:
        """Return the next item of a waiting caller."""
        return self._waiting[caller][0]

    def pop(self, caller: str | None = None) -> T:
        """Remove and return the next item, or the next item of a given caller."""
        if caller is None:
            caller = self.in_order()[0]
        self._level = max(self._level, self._accounts[caller])
        item = self._waiting[caller].popleft()
        if self._waiting[caller]:
            # Move to the end of the order, so that callers with equal accounts take turns.
            self._waiting[caller] = self._waiting.pop(caller)
        self._tidy(caller)
        return item

    def remove(self, caller: str, item: T) -> None:
        """Remove an item; raises `ValueError` if it is not waiting."""
        items = self._waiting.get(caller, deque())
        items.remove(item)
        self._tidy(caller)

    def charge(self, caller: str, seconds: float) -> None:
        """Charge device seconds to a caller."""
        self._accounts[caller] = max(self._accounts.get(caller, 0.0), self._level) + seconds

    def has_had_less(self, caller: str, than: str) -> bool:
        """Whether `caller` has had less device time than the other."""
        account = self._accounts.get(caller, self._level)
        return account < self._accounts.get(than, self._level)

    def ahead_of(
        self, caller: str, item: T, seconds: Callable[[T], float], running: tuple[str, T] | None
    ) -> list[tuple[T, float]]:
        """Return the items that are expected to run before a waiting one, and how long until then.

        `seconds` returns what an item still needs; `running` is the item that runs now. The
        waiting item is next when its caller's account, charged for the caller's earlier items, is
        the smallest. Each other item runs until its caller's account exceeds that, but at least for
        a turn.
        """
        waiting = {name: list(items) for name, items in self._waiting.items()}
        if running is not None:
            waiting = {running[0]: [], **waiting}
            waiting[running[0]].insert(0, running[1])
        own = waiting[caller]
        ahead = [(one, seconds(one)) for one in own[: own.index(item)]]
        start = self._accounts.get(caller, self._level) + sum(needed for _, needed in ahead)
        earlier = True  # of equal accounts, the one waiting longest is next
        for name, items in waiting.items():
            if name == caller:
                earlier = False
                continue
            account = self._accounts.get(name, self._level)
            for one in items:
                now = running is not None and one is running[1]
                if not now and (account > start or (account == start and not earlier)):
                    break
                needed = seconds(one)
                ahead.append((one, min(needed, max(start - account, QUANTUM))))
                account += needed
        return ahead

    def _tidy(self, caller: str) -> None:
        """Drop callers without waiting items whose accounts would restart anyway."""
        if not self._waiting.get(caller):
            self._waiting.pop(caller, None)
        idle = [name for name in self._accounts if name not in self._waiting]
        for name in idle:
            if self._accounts[name] <= self._level:
                del self._accounts[name]


class Turns:
    """Chooses among the requests that are ready to run, fairly and within the device's memory.

    A request that has started uses memory until it ends. Another one starts on two conditions: its
    estimated memory is free now, and the estimates of all started requests together fit into the
    memory that was free before the first of them. Together they need what each holds between steps,
    plus the largest need of one step. While the next request waits for memory, no later one starts.
    Not thread-safe.
    """

    def __init__(self, free: Callable[[float], float]) -> None:
        """`free` returns the free bytes on the device, given how many are needed."""
        self._free = free
        self._free_before = 0.0  # free bytes before the first started request
        self._ready: FairQueue[Job] = FairQueue()
        self._started: set[Job] = set()

    def __iter__(self) -> Iterator[Job]:
        """All requests that wait for a turn, those of each caller in order."""
        return iter(self._ready)

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def started(self) -> int:
        """Number of requests that have started and not ended."""
        return len(self._started)

    def has_started(self, job: Job) -> bool:
        """Whether a request has started and not ended."""
        return job in self._started

    def add(self, job: Job) -> None:
        """Add a waiting request; one that has started goes before its caller's other requests."""
        self._ready.add(job.caller, job, first=job in self._started)

    def remove(self, job: Job) -> None:
        """Remove a waiting request."""
        self._ready.remove(job.caller, job)

    def take(self) -> Job | None:
        """Remove and return the next request, which counts as started until `ended` is called.

        Returns None if the next request must wait for memory.
        """
        job = self._next()
        if job is None:
            return None
        self._started.add(job)
        return self._ready.pop(job.caller)

    def take_unstartable(self) -> Job | None:
        """Remove and return a request that lacks memory although no other request has started."""
        if self._started or not len(self._ready):
            return None
        return self._ready.pop()

    def fits_alone(self, needed: float) -> float:
        """Return the bytes that a request may need if it runs alone."""
        return max(self._free_before, self._free(needed)) if self._started else self._free(needed)

    def ahead_of(self, job: Job, running: Job | None) -> tuple[int, float]:
        """Return the expected requests before a waiting one, and the expected seconds."""
        now = None if running is None else (running.caller, running)
        ahead = self._ready.ahead_of(job.caller, job, lambda one: one.remaining, now)
        return len(ahead), sum(seconds for _, seconds in ahead)

    def ended(self, job: Job) -> None:
        """Mark a job as ended, so that its memory counts as free."""
        self._started.discard(job)

    def charge(self, job: Job, seconds: float) -> None:
        """Charge device seconds to the caller of a job."""
        self._ready.charge(job.caller, seconds)

    def gives_way(self, job: Job, seconds: float) -> bool:
        """Whether a request should pause for another caller after running for `seconds`."""
        if seconds < QUANTUM:
            return False
        following = self._next()
        return following is not None and self._ready.has_had_less(following.caller, job.caller)

    def _next(self) -> Job | None:
        """Return the next request that has started or has room to start; None if there is none."""
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

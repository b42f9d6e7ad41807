"""The one thread that computes on a device.

Requests are generators. One runs until it ends or its reader has fallen behind; then it is set
aside, with the device free for the next, until the reader has caught up.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from januslens_server import telemetry
from januslens_server.errors import DeviceLost, QueueFull, ServerDraining
from januslens_server.scheduling.fair_queue import FairQueue
from januslens_server.scheduling.outlet import Outlet
from januslens_server.scheduling.ticket import Ticket

T = TypeVar("T")
Checkpoint = Callable[[], None]

# RetryInfo for a full queue is its expected length, within these bounds, in seconds.
SOONEST_RETRY, LATEST_RETRY = 0.1, 60.0


def _unchanged(error: Exception) -> Exception:
    return error


def _nothing() -> None:
    pass


@dataclass(eq=False)
class _Job:
    steps: Iterator[Any]
    outlet: Outlet[Any]
    ticket: Ticket
    admitted: float = field(default_factory=time.monotonic)
    started: bool = False

    @property
    def remaining(self) -> float:
        """Seconds of the device that are still expected."""
        return max(0.0, self.ticket.cost.seconds - self.ticket.spent)


class DeviceWorker:
    """Runs admitted requests one at a time, fairly between callers (`FairQueue`).

    A request that resumes goes before the caller's others: it was here earlier and holds memory.
    """

    def __init__(
        self,
        max_waiting: int,
        translate: Callable[[Exception], Exception] = _unchanged,
        on_loss: Callable[[], None] = _nothing,
    ) -> None:
        """Admit up to `max_waiting` requests beyond the one that runs.

        `translate` says in the service's terms what a request failed of; `on_loss` is called by the
        thread, once, if that was the end of the device.
        """
        self._max_waiting = max_waiting
        self._translate = translate
        self._on_loss = on_loss
        self._lost = False
        self._ready: FairQueue[_Job] = FairQueue()
        self._unfinished: set[_Job] = set()
        self._left: deque[_Job] = deque()  # started, and to be closed by the thread
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="device-worker", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Requests admitted and not yet ended: waiting, running, or set aside."""
        return len(self._unfinished)

    @property
    def waiting(self) -> int:
        """Requests admitted that have not had a turn yet."""
        with self._changed:
            return sum(not job.started for job in self._unfinished)

    @property
    def in_flight(self) -> int:
        """Requests that run or are set aside."""
        with self._changed:
            return sum(job.started for job in self._unfinished)

    def submit(
        self, run: Callable[[Checkpoint], Iterator[T]], outlet: Outlet[T], ticket: Ticket
    ) -> None:
        """Admit a request; its results and its error go to `outlet`.

        `run` is handed the ticket's check, to call wherever it can stop early.

        Raises `QueueFull` at once if too many wait, `ServerDraining` if nothing new is taken,
        `DeviceLost` once that happened.
        """
        with self._changed:
            if self._lost:
                raise DeviceLost
            if self._stopping:
                raise ServerDraining("the server is shutting down; ask another replica")
            if len(self._unfinished) > self._max_waiting:
                self._make_room(ticket.caller)
            job = _Job(run(ticket.check), outlet, ticket)
            self._unfinished.add(job)
            self._ready.add(ticket.caller, job)
            self._changed.notify_all()

    def withdraw(self, ticket: Ticket) -> None:
        """The caller is gone: what waits ends now, what runs at its next checkpoint."""
        ticket.cancel()
        with self._changed:
            for job in [job for job in self._ready if job.ticket is ticket]:
                self._ready.remove(ticket.caller, job)
                self._let_go(job)

    def refuse_new(self) -> None:
        """From now on admit nothing."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is unfinished; gives whether that came true in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unfinished, timeout=seconds)

    def _make_room(self, caller: str) -> None:
        """Free a place for `caller`, or raise `QueueFull`.

        Places are shared as the device is: of the callers with requests that have not begun, the
        one with the most places gives way with its newest to one who has at least two fewer.
        """
        for job in [job for job in self._ready if job.ticket.failure]:
            self._ready.remove(job.ticket.caller, job)
            self._let_go(job)
        if len(self._unfinished) <= self._max_waiting:
            return
        refusal = QueueFull(
            f"{self._max_waiting} requests wait already; try again", self._retry_after()
        )
        places = Counter(job.ticket.caller for job in self._unfinished)
        newest = {job.ticket.caller: job for job in self._ready if not job.started}
        crowd = max(newest, key=places.__getitem__, default=caller)
        if places[crowd] < places[caller] + 2:
            raise refusal
        self._ready.remove(crowd, newest[crowd])
        self._end(newest[crowd], refusal)

    def _retry_after(self) -> float:
        """Seconds after which what is admitted now should have been served."""
        expected = sum(job.remaining for job in self._unfinished)
        return min(max(expected, SOONEST_RETRY), LATEST_RETRY)

    def _run(self) -> None:
        while True:
            # No name keeps a job here: what an ended one had captured is freed at once.
            self._advance(self._next())

    def _next(self) -> _Job:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._left or len(self._ready)))
            return self._left.popleft() if self._left else self._ready.pop()

    def _advance(self, job: _Job) -> None:
        """Run one request until it ends or must let its reader catch up."""
        try:
            while True:
                self._close_those_who_left()
                self._check(job)
                job.outlet.put(self._step(job))
                if job.outlet.when_drained(lambda: self._resume(job)):
                    return
        except StopIteration:
            self._end(job, None)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to this request alone
            self._fail(job, self._translate(error))

    def _check(self, job: _Job) -> None:
        if self._lost:
            raise DeviceLost
        job.ticket.check()

    def _fail(self, job: _Job, error: Exception) -> None:
        lost_now = isinstance(error, DeviceLost) and not self._lost
        if lost_now:
            with self._changed:
                self._lost = True
        self._end(job, error)
        if lost_now:  # what waits is told so by `_check`, each in its turn
            self._on_loss()

    def _step(self, job: _Job) -> Any:
        """The job's next result, charged to its caller."""
        began = time.monotonic()
        if not job.started:
            job.started = True
            job.ticket.waited = began - job.admitted
            telemetry.QUEUE_SECONDS.observe(job.ticket.waited)
        try:
            return next(job.steps)
        finally:
            seconds = time.monotonic() - began
            job.ticket.spent += seconds
            telemetry.BUSY_SECONDS.inc(seconds)
            with self._changed:
                self._ready.charge(job.ticket.caller, seconds)

    def _close_those_who_left(self) -> None:
        """Set-aside requests whose callers went: they hold memory, and must not wait for a turn."""
        while self._left:
            job = self._left.popleft()
            self._end(job, job.ticket.failure)

    def _resume(self, job: _Job) -> None:
        with self._changed:
            if job.ticket.failure:
                self._let_go(job)
            else:
                self._ready.add(job.ticket.caller, job, first=True)
            self._changed.notify_all()

    def _let_go(self, job: _Job) -> None:
        """End a request that does not run; a started one is closed by the device's thread alone."""
        if job.started:
            self._left.append(job)
            self._changed.notify_all()
        else:
            self._end(job, job.ticket.failure)

    def _end(self, job: _Job, error: Exception | None) -> None:
        if isinstance(job.steps, Generator):  # one that was stopped between two steps
            job.steps.close()
        with self._changed:
            self._unfinished.discard(job)
            self._changed.notify_all()
        job.outlet.close(error)

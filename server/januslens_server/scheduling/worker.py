"""The one thread that computes on a device.

Requests are generators. One runs until it ends, its reader has fallen behind, or it has had its
time and another caller's is due (`Turns`). Then it is set aside between two steps, with the device
free for the next.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from januslens_server import telemetry
from januslens_server.errors import (
    CancelCheck,
    DeviceLost,
    OutOfMemory,
    QueueFull,
    ServerDraining,
    readable_size,
)
from januslens_server.scheduling.job import Job, QueuedRequest, ResultBuffer
from januslens_server.scheduling.turns import Turns

T = TypeVar("T")

# RetryInfo for a full queue is its expected length, within these bounds, in seconds.
SOONEST_RETRY, LATEST_RETRY = 0.1, 60.0


# While requests wait for memory, it is measured again at least this often, in seconds.
MEMORY_SECONDS = 0.2


def _no_memory(job: Job) -> OutOfMemory:
    return OutOfMemory(
        "not enough free memory on the device: this request is estimated to need "
        f"{readable_size(job.held + job.working)}; try again, or request fewer tokens, layers or "
        "positions"
    )


def _unchanged(error: Exception) -> Exception:
    return error


def _nothing() -> None:
    pass


class DeviceWorker:
    """Runs a step of one admitted request at a time, fairly between callers.

    A request that resumes goes before the caller's others: it was here earlier and holds memory.
    """

    def __init__(
        self,
        max_waiting: int,
        translate: Callable[[Exception], Exception] = _unchanged,
        on_loss: Callable[[], None] = _nothing,
        free: Callable[[float], float] = lambda _needed: math.inf,
    ) -> None:
        """Admit up to `max_waiting` requests beyond the one that runs.

        `free` measures the bytes that are free on the device, given how many a request needs.
        `translate` says in the service's terms why a request failed; `on_loss` is called by the
        thread, once, if that was the end of the device.
        """
        self._max_waiting = max_waiting
        self._translate = translate
        self._on_loss = on_loss
        self._lost = False
        self._turns = Turns(free)
        self._unfinished: set[Job] = set()
        self._left: deque[Job] = deque()  # started, and to be closed by the thread
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
            return len(self._unfinished) - self._turns.started

    @property
    def in_flight(self) -> int:
        """Requests that run or are set aside."""
        with self._changed:
            return self._turns.started

    def fits_alone(self, needed: float) -> float:
        """Bytes that a request may need if it runs while nothing else does."""
        with self._changed:
            return self._turns.fits_alone(needed)

    def submit(
        self,
        run: Callable[[CancelCheck], Iterator[T | None]],
        buffer: ResultBuffer[T],
        request: QueuedRequest,
    ) -> None:
        """Admit a request; its results and its error go to `buffer`.

        `run` is handed the request's check, to call wherever it can stop early. Where it has no
        result yet but may be set aside, it yields None.

        Raises `QueueFull` at once if too many wait, `ServerDraining` if nothing new is taken,
        `DeviceLost` once that happened.
        """
        with self._changed:
            if self._lost:
                raise DeviceLost
            if self._stopping:
                raise ServerDraining("the server is shutting down; ask another replica")
            if len(self._unfinished) > self._max_waiting:
                self._make_room(request.caller)
            job = Job(run(request.check), buffer, request)
            self._unfinished.add(job)
            self._turns.add(job)
            self._changed.notify_all()

    def withdraw(self, request: QueuedRequest) -> None:
        """The caller is gone: what waits ends now, what runs when it next calls its check."""
        request.cancel()
        with self._changed:
            for job in [job for job in self._turns if job.request is request]:
                self._turns.remove(job)
                self._let_go(job)

    def refuse_new(self) -> None:
        """Refuse all further requests with `ServerDraining`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _make_room(self, caller: str) -> None:
        """Free a place for `caller`, or raise `QueueFull`.

        Callers share the places. Among callers with requests that have not started, the one with
        the most places loses its newest request, if `caller` has at least two places fewer.
        """
        for job in [job for job in self._turns if job.request.failure]:
            self._turns.remove(job)
            self._let_go(job)
        if len(self._unfinished) <= self._max_waiting:
            return
        refusal = QueueFull(
            f"{self._max_waiting} requests wait already; try again", self._retry_after()
        )
        places = Counter(job.caller for job in self._unfinished)
        newest = {job.caller: job for job in self._turns if not self._turns.has_started(job)}
        crowd = max(newest, key=places.__getitem__, default=caller)
        if places[crowd] < places[caller] + 2:
            raise refusal
        self._turns.remove(newest[crowd])
        self._end(newest[crowd], refusal)

    def _retry_after(self) -> float:
        """Estimated seconds until all requests that are admitted now have been served."""
        expected = sum(job.remaining for job in self._unfinished)
        return min(max(expected, SOONEST_RETRY), LATEST_RETRY)

    def _run(self) -> None:
        while True:
            # No name keeps a job here: what an ended one had captured is freed at once.
            self._advance(self._next())

    def _next(self) -> Job:
        """The job to go on with; waits until there is one that has the memory it needs."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._left or len(self._turns)))
                if self._left:
                    return self._left.popleft()
                if (job := self._turns.take()) is not None:
                    return job
                refused = self._turns.take_unstartable()
                if refused is None:  # something that has started will end, and free memory
                    self._changed.wait(MEMORY_SECONDS)
                    continue
            self._end(refused, refused.request.failure or _no_memory(refused))
            del refused

    def _advance(self, job: Job) -> None:
        """Run one request until it ends, or must let its reader catch up or others compute."""
        began = time.monotonic()
        try:
            while True:
                self._close_those_who_left()
                self._check(job)
                self._step(job)
                if job.buffer.when_drained(lambda: self._resume(job)):
                    return
                if self._set_aside(job, time.monotonic() - began):
                    return
        except StopIteration:
            self._end(job, None)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to this request alone
            self._fail(job, self._translate(error))

    def _check(self, job: Job) -> None:
        if self._lost:
            raise DeviceLost
        job.request.check()

    def _fail(self, job: Job, error: Exception) -> None:
        lost_now = isinstance(error, DeviceLost) and not self._lost
        if lost_now:
            with self._changed:
                self._lost = True
        self._end(job, error)
        if lost_now:  # what waits is told so by `_check`, each in its turn
            self._on_loss()

    def _step(self, job: Job) -> None:
        """Compute one step and put its result, if any, into the buffer."""
        result = self._charged(job)
        if result is not None:
            job.buffer.put(result)

    def _charged(self, job: Job) -> Any:
        """What the job's next step gives; its caller is charged for it."""
        began = time.monotonic()
        if job.request.waited is None:
            job.request.waited = began - job.admitted
            telemetry.QUEUE_SECONDS.observe(job.request.waited)
        try:
            return next(job.steps)
        finally:
            seconds = time.monotonic() - began
            job.request.spent += seconds
            telemetry.BUSY_SECONDS.inc(seconds)
            with self._changed:
                self._turns.charge(job, seconds)

    def _set_aside(self, job: Job, seconds: float) -> bool:
        """Let another caller's request run if one is due and this one has had its time."""
        with self._changed:
            if job.request.failure or not self._turns.gives_way(job, seconds):
                return False
            self._turns.add(job)
            return True

    def _close_those_who_left(self) -> None:
        """Close suspended requests that were cancelled, without waiting for their turn."""
        while self._left:
            job = self._left.popleft()
            self._end(job, job.request.failure)

    def _resume(self, job: Job) -> None:
        with self._changed:
            if job.request.failure:
                self._let_go(job)
            else:
                self._turns.add(job)
            self._changed.notify_all()

    def _let_go(self, job: Job) -> None:
        """End a request that does not run; a started one is closed by the device's thread alone."""
        if self._turns.has_started(job):
            self._left.append(job)
            self._changed.notify_all()
        else:
            self._end(job, job.request.failure)

    def _end(self, job: Job, error: Exception | None) -> None:
        job.close()
        with self._changed:
            self._turns.ended(job)
            self._unfinished.discard(job)
            self._changed.notify_all()
        job.buffer.close(error)

"""Run requests on the single thread that computes on a device.

Requests are generators. A request runs until it ends, its buffer is full, or another caller's
request is due (`Turns`). In the last two cases it pauses between two steps.
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
    DeadlinePassed,
    DeviceLost,
    OutOfMemory,
    QueueFull,
    RequestCancelled,
    ServerDraining,
    readable_size,
)
from januslens_server.scheduling.job import Job, QueuedRequest, ResultBuffer, Waiting
from januslens_server.scheduling.turns import Turns

T = TypeVar("T")

# Bounds of the retry delay for a full queue, in seconds.
SOONEST_RETRY, LATEST_RETRY = 0.1, 60.0


# Seconds between two measurements of free memory while requests wait for it.
MEMORY_SECONDS = 0.2


def _draining() -> ServerDraining:
    return ServerDraining("the server is shutting down; ask another replica")


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
    """Runs the steps of admitted requests, one at a time and fairly between callers.

    A request that continues goes before its caller's other requests, because it was admitted
    earlier and uses memory.
    """

    def __init__(
        self,
        max_waiting: int,
        translate: Callable[[Exception], Exception] = _unchanged,
        on_loss: Callable[[], None] = _nothing,
        free: Callable[[float], float] = lambda _needed: math.inf,
    ) -> None:
        """Admit up to `max_waiting` requests in addition to the running one.

        `translate` converts exceptions of computations to errors of the service. `on_loss` is
        called once, in the worker's thread, if the device is lost. `free` returns the free bytes on
        the device, given how many a request needs.
        """
        self._max_waiting = max_waiting
        self._translate = translate
        self._on_loss = on_loss
        self._lost = False
        self._turns = Turns(free)
        self._running: Job | None = None
        self._unfinished: set[Job] = set()
        self._left: deque[Job] = deque()  # started jobs that the thread must close
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="device-worker", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Number of requests that have not ended: waiting, running or paused."""
        return len(self._unfinished)

    @property
    def waiting(self) -> int:
        """Number of requests that have not started."""
        with self._changed:
            return len(self._unfinished) - self._turns.started

    @property
    def in_flight(self) -> int:
        """Number of requests that run or are paused."""
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
        """Admit a request; its results and its error are put into `buffer`.

        `run` gets the request's check, and calls it wherever it can stop early. It yields None
        where it can pause without a result.

        Raises `QueueFull` if too many requests wait, `ServerDraining` after `refuse_new`, and
        `DeviceLost` if the device is lost.
        """
        with self._changed:
            if self._lost:
                raise DeviceLost
            if self._stopping:
                raise _draining()
            if len(self._unfinished) > self._max_waiting:
                self._make_room(request.caller)
            job = Job(run(request.check), buffer, request)
            self._unfinished.add(job)
            self._turns.add(job)
            self._changed.notify_all()

    def withdraw(self, request: QueuedRequest) -> None:
        """Cancel a request; it ends now if it is waiting, otherwise at its next check."""
        request.cancel()
        with self._changed:
            for job in [job for job in self._turns if job.request is request]:
                self._turns.remove(job)
                self._let_go(job)

    def waiting_place(self, request: QueuedRequest) -> Waiting | None:
        """Return the place of a request in the queue; None if it has started or ended."""
        with self._changed:
            found = (job for job in self._turns if job.request is request)
            job = next(found, None)
            if job is None or self._turns.has_started(job):
                return None
            requests, seconds = self._turns.ahead_of(job, self._running)
            return Waiting(requests, seconds, time.monotonic() - job.admitted)

    def refuse_new(self) -> None:
        """Refuse requests that have not started, now and from now on, with `ServerDraining`."""
        with self._changed:
            self._stopping = True
            for job in [job for job in self._turns if not self._turns.has_started(job)]:
                self._turns.remove(job)
                self._end(job, _draining())
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
            # The job has no name here, so that an ended job's tensors are freed at once.
            self._advance(self._next())

    def _next(self) -> Job:
        """Wait for a job that can run, and return it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._left or len(self._turns)))
                if self._left:
                    return self._left.popleft()
                if (job := self._turns.take()) is not None:
                    return job
                refused = self._turns.take_unstartable()
                if refused is None:  # wait until a started request frees memory
                    self._changed.wait(MEMORY_SECONDS)
                    continue
            self._end(refused, refused.request.failure or _no_memory(refused))
            del refused

    def _advance(self, job: Job) -> None:
        """Run one request until it ends, its buffer is full, or another request is due."""
        began = time.monotonic()
        self._running = job
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
        except (RequestCancelled, DeadlinePassed) as error:
            # Its traceback would hold the tensors of the pass until the caller's stream has ended.
            self._end(job, error.with_traceback(None))
        except Exception as error:  # noqa: BLE001 - any error ends only this request
            self._fail(job, self._translate(error))
        finally:
            self._running = None

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
        if lost_now:  # `_check` ends all other requests
            self._on_loss()

    def _step(self, job: Job) -> None:
        """Compute one step and put its result, if any, into the buffer."""
        result = self._charged(job)
        if result is not None:
            job.buffer.put(result)

    def _charged(self, job: Job) -> Any:
        """Compute the job's next step, and charge its caller for the time."""
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
        """Pause this request if another caller's request is due; return whether it is paused."""
        with self._changed:
            if job.request.failure or not self._turns.gives_way(job, seconds):
                return False
            self._turns.add(job)
            return True

    def _close_those_who_left(self) -> None:
        """Close paused requests that were cancelled, without waiting for their turn."""
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
        """End a request that does not run; the device's thread closes it if it has started."""
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

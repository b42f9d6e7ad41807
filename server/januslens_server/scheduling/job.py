"""A job on a device's thread: its request, its steps, and the buffer of its results."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from januslens_server.errors import DeadlinePassed, RequestCancelled
from januslens_server.results import Cost

ANONYMOUS = "anonymous"
FREE = Cost()


class Cancellation:
    """The deadline and the cancellation of a request, for work in other threads.

    It has its own event, because gRPC's cannot be read from another thread.
    """

    def __init__(self, seconds: float | None) -> None:
        """`seconds` is the time until the caller's deadline; None means no deadline."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Cancel the request; its next check raises `RequestCancelled`."""
        self._cancelled.set()

    @property
    def failure(self) -> RequestCancelled | DeadlinePassed | None:
        """The error for which the request should stop; None if it may continue."""
        if self._cancelled.is_set():
            return RequestCancelled("the caller cancelled the request")
        if self._deadline is not None and time.monotonic() > self._deadline:
            return DeadlinePassed(
                "the request's deadline passed; set a later deadline or request fewer layers"
            )
        return None

    def check(self) -> None:
        """Raise `RequestCancelled` or `DeadlinePassed` if the request should stop."""
        failure = self.failure
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # breaks the reference cycle of error, traceback and frame


@dataclass(frozen=True)
class Waiting:
    """The place of a request that has not started.

    Attributes:
        requests_ahead: Number of requests that are expected to run before it, with the running one.
        expected_seconds: Expected seconds until it starts, without waits for memory.
        waited_seconds: Seconds since it was admitted.
    """

    requests_ahead: int
    expected_seconds: float
    waited_seconds: float


class QueuedRequest(Cancellation):
    """The caller, cost, deadline and cancellation of one request, from admission to its end.

    The compute thread checks it before every step.
    """

    def __init__(self, seconds: float | None, caller: str = ANONYMOUS, cost: Cost = FREE) -> None:
        """`seconds` is the time until the caller's deadline; None means no deadline."""
        super().__init__(seconds)
        self.caller = caller
        self.cost = cost
        self.waited: float | None = None  # seconds from admission to the first step
        self.spent = 0.0  # device seconds used so far


T = TypeVar("T")


class ResultBuffer(Generic[T]):
    """Results that have been computed but not read yet, with a limit on their bytes."""

    def __init__(
        self,
        limit: int,
        size: Callable[[T], int],
        count: Callable[[int], None] = lambda _change: None,
    ) -> None:
        """Limit the results to about `limit` bytes, as `size` counts them.

        `count` is called in the reader's event loop with every change of the bytes that wait. The
        buffer must be created in that loop.
        """
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[T, int] | None] = asyncio.Queue()
        self._size = size
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._drained: Callable[[], None] | None = None
        self._any = asyncio.Event()
        self._abandoned = False

    def put(self, item: T) -> None:
        """Add an item without blocking; drop it if the reader has left. For the producer."""
        size = self._size(item)
        with self._lock:
            if self._abandoned:
                return
            self._held += size
        self._send((item, size))

    def close(self, error: Exception | None = None) -> None:
        """Mark the end; the reader gets all items, then `error`, if any. For the producer."""
        with self._lock:
            if self._abandoned:
                return
            self._error = error
        self._send(None)

    def _send(self, entry: tuple[T, int] | None) -> None:
        # A closed loop raises RuntimeError. It has no reader any more, because the server has
        # ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrive, entry)

    def _arrive(self, entry: tuple[T, int] | None) -> None:
        if entry is not None and not self._abandoned:
            self._count(entry[1])
        self._items.put_nowait(entry)
        self._any.set()

    def when_drained(self, resume: Callable[[], None]) -> bool:
        """If full, return True and call `resume` when there is room. For the producer."""
        with self._lock:
            if self._held < self._limit:
                return False
            self._drained = resume
            return True

    async def begins(self, seconds: float) -> bool:
        """Wait for the first item or the end; returns False after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._any.wait()
        except TimeoutError:
            return False
        return True

    async def items(self) -> AsyncIterator[T]:
        """Yield all items in order; raise the error that the producer closed with.

        An item counts until the next one is requested, but only the reader keeps it in memory.
        """
        while (entry := await self._items.get()) is not None:
            held, size = [entry[0]], entry[1]
            del entry
            yield held.pop()
            self._release(size)
        # An error's traceback refers to tensors, so do not keep a reference to the error.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error

    def abandon(self) -> None:
        """Discard all items, and let a waiting producer continue. For a reader that leaves."""
        with self._lock:
            self._abandoned = True
            self._held = 0
            self._error = None
        self._resume()

    def _release(self, size: int) -> None:
        self._count(-size)
        with self._lock:
            self._held -= size
            room = self._held < self._limit
        if room:
            self._resume()

    def _resume(self) -> None:
        with self._lock:
            resume, self._drained = self._drained, None
        if resume is not None:
            resume()


@dataclass(eq=False)
class Job:
    """A request on the device: its steps, the buffer of its results, and its admission record.

    Other requests may run between two of its steps. A step returns a result, or None if there is
    none yet.
    """

    steps: Iterator[Any]
    buffer: ResultBuffer[Any]
    request: QueuedRequest
    admitted: float = field(default_factory=time.monotonic)

    @property
    def caller(self) -> str:
        """Name of the caller that device time is charged to."""
        return self.request.caller

    @property
    def held(self) -> int:
        """Bytes on the device that stay in use between two steps, once the job has started."""
        return self.request.cost.held

    @property
    def working(self) -> int:
        """Further bytes that a step may need."""
        return self.request.cost.memory - self.request.cost.held

    @property
    def remaining(self) -> float:
        """Device seconds that the job is still expected to need."""
        return max(0.0, self.request.cost.seconds - self.request.spent)

    def close(self) -> None:
        """Release everything that the computation used."""
        if isinstance(self.steps, Generator):  # stopped between two steps
            self.steps.close()

"""A request on a device's thread: its request, its steps, and the queue of its results."""

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


class QueuedRequest:
    """The caller, cost, deadline and cancellation of one request, from admission to its end.

    The compute thread checks it before every step. gRPC's own cancellation flags cannot be polled
    from another thread, so this keeps an event of its own.
    """

    def __init__(self, seconds: float | None, caller: str = ANONYMOUS, cost: Cost = FREE) -> None:
        """Expire after `seconds`, the time until the caller's deadline; None means no deadline."""
        self.caller = caller
        self.cost = cost
        self.waited: float | None = None  # seconds until its first turn
        self.spent = 0.0  # seconds of the device so far
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Cancel the request; its next check raises `RequestCancelled`."""
        self._cancelled.set()

    @property
    def failure(self) -> RequestCancelled | DeadlinePassed | None:
        """Why the request should stop; None while it may go on."""
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
            del failure  # a traceback's frame that names its error keeps both alive


T = TypeVar("T")


class ResultBuffer(Generic[T]):
    """Results of a request that its reader has not taken yet, with a limit on their bytes."""

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        """Hold about `limit` bytes as `size` counts them. Must be made on the reader's loop."""
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[T, int] | None] = asyncio.Queue()
        self._size = size
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._drained: Callable[[], None] | None = None
        self._abandoned = False

    def put(self, item: T) -> None:
        """Producer: hand over an item; never blocks. Without a reader it is dropped."""
        size = self._size(item)
        with self._lock:
            if self._abandoned:
                return
            self._held += size
        self._send((item, size))

    def close(self, error: Exception | None = None) -> None:
        """Producer: nothing more comes; the reader sees `error` after what was put."""
        with self._lock:
            if self._abandoned:
                return
            self._error = error
        self._send(None)

    def _send(self, entry: tuple[T, int] | None) -> None:
        # A loop that is closed raises, and has no reader left: the server is gone.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._items.put_nowait, entry)

    def when_drained(self, resume: Callable[[], None]) -> bool:
        """Producer: if full, call `resume` once there is room; gives whether it will be called."""
        with self._lock:
            if self._held < self._limit:
                return False
            self._drained = resume
            return True

    async def items(self) -> AsyncIterator[T]:
        """Yield all items in order; raise the error that the producer closed with."""
        while (entry := await self._items.get()) is not None:
            item, size = entry
            yield item
            self._release(size)
        # An error keeps alive what it passed through, tensors too: here nothing may keep it.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error

    def abandon(self) -> None:
        """Reader: gone; let a producer that waits for room find out, and none wait again."""
        with self._lock:
            self._abandoned = True
            self._held = 0
            self._error = None
        self._resume()

    def _release(self, size: int) -> None:
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

    Between two steps it may be set aside. A step gives a result, or None if it has none yet.
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
        """Bytes of the device that it may keep between two steps, once it has started."""
        return self.request.cost.held

    @property
    def working(self) -> int:
        """Further bytes that it may need during a step."""
        return self.request.cost.memory - self.request.cost.held

    @property
    def remaining(self) -> float:
        """Seconds of the device that are still expected."""
        return max(0.0, self.request.cost.seconds - self.request.spent)

    def close(self) -> None:
        """Release everything that the computation used."""
        if isinstance(self.steps, Generator):  # one that was stopped between two steps
            self.steps.close()

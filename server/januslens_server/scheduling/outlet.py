"""From the compute thread to the event loop, bounded by bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Outlet(Generic[T]):
    """Results on their way to one reader. `full` tells the producer to let others go first."""

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
        """Reader: everything put, in order; raises what the producer closed with."""
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

"""Bound the results that are computed but not read, in bytes over all streams.

A stream that its caller does not read keeps results in its buffer or encoded messages, and its
pipeline keeps what the next result needs: for a long trace of the demo some 18 MiB in all, until it
is aborted. The number of such streams is bounded only by the limits on connections
and calls. So above a number of bytes, the streams that have not been read for the longest are
ended, first those of the caller with the most unread bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from januslens_server.errors import QueueFull, ReaderStalled, RequestCancelled, readable_size
from januslens_server.rpc.call import Context, retrieve_error

# Seconds for which a stream must not have been read before it is ended for its bytes.
PATIENCE = 1.0


class UnreadStream:
    """One open stream: its caller, its unread bytes, and since when a write of it waits."""

    def __init__(self, caller: str, total: Unread) -> None:
        """Must be created in the event loop of the server."""
        self.caller = caller
        self.size = 0
        self.waits_since: float | None = None
        # Done when the stream must end because too many bytes are unread.
        self.evicted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._total = total

    def count(self, change: int) -> None:
        """Add or subtract unread bytes."""
        self._total.count(self, change)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Mark that a message waits to be read."""
        self.waits_since = time.monotonic()
        try:
            yield
        finally:
            self.waits_since = None


class Unread:
    """All open streams of a server. Used in its event loop only."""

    def __init__(self, limit: int) -> None:
        """Allow about `limit` unread bytes."""
        self._limit = limit
        self._size = 0
        self._streams: set[UnreadStream] = set()
        self._looking = False

    @contextmanager
    def stream(self, caller: str) -> Iterator[UnreadStream]:
        """Open a stream.

        Raises `QueueFull` if too many bytes are unread and the caller has its share of them.
        """
        callers = {stream.caller for stream in self._streams} | {caller}
        own = sum(stream.size for stream in self._streams if stream.caller == caller)
        if self._size > self._limit and own >= self._limit / len(callers):
            raise QueueFull(
                f"{readable_size(own)} of your results are not read yet; read them, or end their "
                "streams"
            )
        stream = UnreadStream(caller, self)
        self._streams.add(stream)
        try:
            yield stream
        finally:
            stream.count(-stream.size)
            self._streams.discard(stream)

    def count(self, stream: UnreadStream, change: int) -> None:
        """Change the unread bytes of a stream, and end others if there are too many."""
        if stream not in self._streams:
            return
        stream.size += change
        self._size += change
        if change > 0 and self._size > self._limit:
            self._end_slowest()

    def _end_slowest(self) -> None:
        """End streams until few enough bytes are unread; look again if none has waited for long."""
        left = self._size - sum(s.size for s in self._streams if s.evicted.done())
        while left > self._limit:
            of_callers: Counter[str] = Counter()
            for stream in self._streams:
                of_callers[stream.caller] += 0 if stream.evicted.done() else stream.size
            stalled = [stream for stream in self._streams if self._has_waited(stream)]
            if not stalled:
                self._look_again()
                return
            slowest = min(stalled, key=lambda s: (-of_callers[s.caller], s.waits_since))
            slowest.evicted.set_result(None)
            left -= slowest.size

    def _has_waited(self, stream: UnreadStream) -> bool:
        since = stream.waits_since
        waited = since is not None and time.monotonic() - since >= PATIENCE
        return waited and not stream.evicted.done()

    def _look_again(self) -> None:
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(PATIENCE, self._look)

    def _look(self) -> None:
        self._looking = False
        if self._size > self._limit:
            self._end_slowest()


async def write_within(
    context: Context,
    message: bytes,
    seconds: float,
    evicted: asyncio.Future[None] | None = None,
) -> None:
    """Write one message of a stream.

    Raises `ReaderStalled` if the caller does not take it within `seconds`, or before `evicted` is
    done, and `RequestCancelled` if the connection breaks.
    """
    # `wait_for` does not work here: if a blocked write is cancelled, it raises an error of its own,
    # which would replace the cancellation.
    write = asyncio.ensure_future(context.write(message))
    awaited = {write} if evicted is None else {write, evicted}
    try:
        finished, _ = await asyncio.wait(
            awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        write.cancel()  # has no effect on a finished write
        write.add_done_callback(retrieve_error)
    if write not in finished and evicted in finished:
        raise ReaderStalled(
            "too many results are not read (--max-unread); the slowest streams were ended; read "
            "faster, or request fewer layers, positions or vectors"
        )
    if write not in finished:
        raise ReaderStalled(
            f"the stream was not read for {seconds:g} s; read faster, or request fewer layers, "
            "positions or vectors"
        )
    try:
        write.result()
    except grpc.aio.InternalError as error:
        raise RequestCancelled("the connection to the caller was lost") from error

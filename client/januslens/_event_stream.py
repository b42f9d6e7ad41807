"""The events of a stream, one by one, for both clients."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Protocol, Self

import grpc

from januslens._assemblers import EventT, ResultT
from januslens._resuming import ResumableStream
from januslens.errors import StreamInterrupted


class Responses(Protocol):
    """A call whose responses are still coming."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def cancel(self) -> object: ...


class EventStream(Generic[EventT, ResultT]):
    """The header, the layers or matrices as they arrive, the summary.

    Iterate over it; `result()` is the whole. Closing it, or leaving its `with` block, cancels the
    call if it still runs, and iteration ends.
    """

    def __init__(
        self,
        start: Callable[[ResumableStream[EventT, ResultT]], Responses],
        course: ResumableStream[EventT, ResultT],
    ) -> None:
        self._start = start
        self._resumable = course
        self._ready: deque[EventT] = deque()
        self._closed = False
        self._open()

    def _open(self) -> None:
        self._call = self._start(self._resumable)

    @property
    def interruptions(self) -> tuple[StreamInterrupted, ...]:
        """Where the stream was cut and went on at another replica, with `resume=True`."""
        return tuple(self._resumable.interruptions)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EventT:
        """The next event.

        Raises:
            StreamInterrupted: The stream was cut; `partial` holds what had come.
            JanuslensError: The call failed, likewise.
        """
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            self._advance()
        raise StopIteration

    def _advance(self) -> None:
        """Take the next message, or open the next call where this one was cut."""
        try:
            response = next(self._call)
        except StopIteration:
            if self._resumable.complete:
                raise
            self._resumable.cut(None)
        except grpc.RpcError as error:
            self._resumable.cut(error)
        else:
            self._ready.extend(self._resumable.take(response))
            return
        time.sleep(self._resumable.pause)
        self._open()

    def result(self) -> ResultT:
        """The whole, once everything has arrived; waits for what has not.

        Raises:
            StreamInterrupted: The stream ended without its summary, or was closed before it.
            JanuslensError: The call failed; `partial` holds what had come.
        """
        for _ in self:
            pass
        return self._resumable.result()

    def close(self) -> None:
        """Cancel the call if it still runs; the server stops computing."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncResponses(Protocol):
    """A call whose responses are still coming."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    def cancel(self) -> bool: ...


class AsyncEventStream(Generic[EventT, ResultT]):
    """The header, the layers or matrices as they arrive, the summary.

    Iterate over it; `await result()` is the whole. Closing it, leaving its `async with` block or
    dropping the last reference to it cancels the call if it still runs, and iteration ends.
    """

    def __init__(
        self,
        start: Callable[[ResumableStream[EventT, ResultT]], AsyncResponses],
        course: ResumableStream[EventT, ResultT],
    ) -> None:
        self._start = start
        self._resumable = course
        self._ready: deque[EventT] = deque()
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._open()

    def _open(self) -> None:
        self._call = self._start(self._resumable)
        self._responses = aiter(self._call)

    @property
    def interruptions(self) -> tuple[StreamInterrupted, ...]:
        """Where the stream was cut and went on at another replica, with `resume=True`."""
        return tuple(self._resumable.interruptions)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventT:
        """The next event.

        Raises:
            StreamInterrupted: The stream was cut; `partial` holds what had come.
            JanuslensError: The call failed, likewise.
        """
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            await self._advance()
        raise StopAsyncIteration

    async def _advance(self) -> None:
        """Take the next message, or open the next call where this one was cut."""
        try:
            response = await anext(self._responses)
        except StopAsyncIteration:
            if self._resumable.complete:
                raise
            self._resumable.cut(None)
        except grpc.RpcError as error:
            self._resumable.cut(error)
        except asyncio.CancelledError:
            if self._closed:  # the call was cancelled by close(), not the task by its owner
                raise StopAsyncIteration from None
            raise
        else:
            self._ready.extend(self._resumable.take(response))
            return
        await asyncio.sleep(self._resumable.pause)
        self._open()

    async def result(self) -> ResultT:
        """The whole, once everything has arrived; waits for what has not.

        Raises:
            StreamInterrupted: The stream ended without its summary, or was closed before it.
            JanuslensError: The call failed; `partial` holds what had come.
        """
        async for _ in self:
            pass
        return self._resumable.result()

    async def close(self) -> None:
        """Cancel the call if it still runs; the server stops computing."""
        self._closed = True
        self._call.cancel()

    def __del__(self) -> None:
        """Cancel the call of a stream that was dropped without being closed.

        gRPC's own call object stays alive as long as the call runs. This may run in any thread, at
        any time, and calls belong to the thread of their loop.
        """
        call = getattr(self, "_call", None)  # missing if the first call could not be made
        if call is None or self._closed or self._loop.is_closed():
            return
        with suppress(RuntimeError):  # the loop was closed just now
            self._loop.call_soon_threadsafe(call.cancel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

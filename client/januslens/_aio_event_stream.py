"""A stream's events one by one, for the asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self

import grpc
from google.protobuf.message import Message

from januslens._connection import Attempt
from januslens._stream.assembler import Assembler, EventT, ResultT


class AsyncResponses(Protocol):
    """A call whose responses are still coming."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    def cancel(self) -> bool: ...


class AsyncEventStream(Generic[EventT, ResultT]):
    """The header, the layers or matrices as they arrive, the summary.

    Iterate over it; `await result()` is the whole. Closing it, or leaving its `async with` block,
    cancels the call if it still runs, and iteration ends.
    """

    def __init__(
        self,
        responses: AsyncResponses,
        assembler: Assembler[Any, EventT, ResultT],
        attempt: Attempt,
    ) -> None:
        self._call = responses
        self._responses = aiter(responses)
        self._assembler = assembler
        self._attempt = attempt
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventT:
        """The next event.

        Raises:
            StreamInterrupted: The stream ended without its summary.
            JanuslensError: The call failed; `partial` holds what had come.
        """
        while not self._closed:
            event = self._assembler.feed(await self._next_response())
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _next_response(self) -> Message:
        try:
            response: Message = await anext(self._responses)
        except StopAsyncIteration:
            self._assembler.result()  # raises if the summary is missing
            raise
        except grpc.RpcError as error:
            raise self._attempt.failure(error, self._assembler.partial()) from error
        except asyncio.CancelledError:
            if self._closed:  # the call was cancelled by close(), not the task by its owner
                raise StopAsyncIteration from None
            raise
        self._attempt.connection.seen(response)
        return response

    async def result(self) -> ResultT:
        """The whole, once everything has arrived; waits for what has not.

        Raises:
            StreamInterrupted: The stream ended without its summary, or was closed before it.
            JanuslensError: The call failed; `partial` holds what had come.
        """
        async for _ in self:
            pass
        return self._assembler.result()

    async def close(self) -> None:
        """Cancel the call if it still runs; the server stops computing."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

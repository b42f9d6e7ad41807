"""A stream's events one by one, for the synchronous client."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self

import grpc
from google.protobuf.message import Message

from januslens._connection import Attempt
from januslens._stream.assembler import Assembler, EventT, ResultT


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
        self, responses: Responses, assembler: Assembler[Any, EventT, ResultT], attempt: Attempt
    ) -> None:
        self._responses = responses
        self._assembler = assembler
        self._attempt = attempt
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EventT:
        """The next event.

        Raises:
            StreamInterrupted: The stream ended without its summary.
            JanuslensError: The call failed; `partial` holds what had come.
        """
        while not self._closed:
            event = self._assembler.feed(self._next_response())
            if event is not None:
                return event
        raise StopIteration

    def _next_response(self) -> Message:
        try:
            response: Message = next(self._responses)
        except StopIteration:
            self._assembler.result()  # raises if the summary is missing
            raise
        except grpc.RpcError as error:
            raise self._attempt.failure(error, self._assembler.partial()) from error
        self._attempt.connection.seen(response)
        return response

    def result(self) -> ResultT:
        """The whole, once everything has arrived; waits for what has not.

        Raises:
            StreamInterrupted: The stream ended without its summary, or was closed before it.
            JanuslensError: The call failed; `partial` holds what had come.
        """
        for _ in self:
            pass
        return self._assembler.result()

    def close(self) -> None:
        """Cancel the call if it still runs; the server stops computing."""
        self._closed = True
        self._responses.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

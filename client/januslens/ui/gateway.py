"""The contract's calls as they are: the page speaks protobuf JSON, the server protobuf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from januslens._aio import AsyncClient
from januslens._aio_event_stream import AsyncEventStream
from januslens._stream.assembler import Assembler
from januslens._stream.gradient_splice import GradientSplice
from januslens._stream.splice import Splice
from januslens._stream.trace_splice import TraceSplice
from januslens._verbs.calls import StreamCall, UnaryCall
from januslens.errors import StreamInterrupted

# What joins the rest of a stream that was cut to its beginning, by method.
_SPLICES: dict[str, Callable[[Any], Splice[Any, Any]]] = {
    "Trace": TraceSplice,
    "GradientLens": GradientSplice,
}


class Forwarded(Assembler[Any, Message, list[Any]]):
    """Checks that a stream is whole and gives every message back as it came."""

    interrupted = StreamInterrupted

    def partial(self) -> list[Any]:
        """The messages so far."""
        return self.responses

    @property
    def complete(self) -> bool:
        """Whether the summary has come."""
        return bool(self.responses) and self.responses[-1].WhichOneof("event") == "summary"

    def _read(self, response: Any) -> Message:
        message: Message = response
        return message


class Gateway(AsyncClient):
    """An asynchronous client that forwards requests instead of making them."""

    async def ask(self, method: str, request: Message) -> Message:
        """One response.

        Raises:
            JanuslensError: The call failed.
        """
        response: Any = await self._send(UnaryCall(method, request, None))
        message: Message = response
        return message

    def stream(self, method: str, request: Message) -> AsyncEventStream[Message, list[Any]]:
        """The responses as they come; leaving its `async with` block cancels the call."""
        call = StreamCall(method, request, None, Forwarded(), _SPLICES[method](request))
        return self._open(call)

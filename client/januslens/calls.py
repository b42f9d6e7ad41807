"""Calls of the synchronous client.

Generated from `aio_calls.py` by client/generate.py; do not edit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self

import grpc
from google.protobuf.message import Message

from januslens._channels import Channel
from januslens._connection import Connection
from januslens._resuming import ResumableCall, ResumableStream
from januslens.arguments import TargetLike
from januslens.assemblers import Assembler, EventT, ResultT
from januslens.errors import StreamInterrupted
from januslens.interventions import Intervention, counted_from_start
from januslens.results.generation import GeneratedText
from januslens.results.gradient import Gradient
from januslens.results.models import CostEstimate
from januslens.results.trace import Trace
from januslens.v1 import cost_pb2, interventions_pb2

if TYPE_CHECKING:
    from januslens.client import Client


class Calls:
    """Calls over the connection of a client. Close it, or use it as a context manager."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channel = Channel(connection)

    def close(self) -> None:
        """Close the client; running calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _estimate(
        self, request: cost_pb2.EstimateCostRequest, timeout: float | None
    ) -> CostEstimate:
        return CostEstimate.from_message(self._send("EstimateCost", request, timeout))

    def _send(self, method: str, request: Message, timeout: float | None) -> Any:
        """Make a unary call and return its response."""
        call = ResumableCall(self._connection, method, request, timeout)
        while True:
            try:
                response = self._channel.response(call)
            except grpc.RpcError as error:
                call.failed(error)
                self._channel.sleep(call.pause)
            else:
                self._connection.seen(response)
                return response

    def _stream(
        self,
        method: str,
        request: Message,
        timeout: float | None,
        assembler: Assembler[Any, EventT, ResultT],
    ) -> EventStream[EventT, ResultT]:
        """Start a streaming call."""
        call = ResumableStream(self._connection, method, request, timeout, assembler)
        return EventStream(self._channel, call)


class EventStream(Generic[EventT, ResultT]):
    """The events of a stream: the header, each layer or matrix when it is complete, the summary.

    Iterate over it, or call `result()` for the whole result. Closing it, leaving its context or
    dropping the last reference to it cancels the call if it is still running.
    """

    def __init__(self, channel: Channel, call: ResumableStream[EventT, ResultT]) -> None:
        self._channel = channel
        self._call = call
        self._ready: deque[EventT] = deque()
        self._closed = False
        self._responses = channel.responses(call)

    @property
    def interruptions(self) -> tuple[StreamInterrupted, ...]:
        """The interruptions after which the stream was resumed on another replica."""
        return tuple(self._call.interruptions)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EventT:
        """Return the next event; a closed stream has none.

        Raises:
            StreamInterrupted: The stream was interrupted; `partial` has what was received.
            JanuslensError: The call failed; `partial` has what was received.
        """
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            self._advance()
        raise StopIteration

    def _advance(self) -> None:
        """Take the next message, or resume the interrupted call."""
        try:
            response = next(self._responses)
        except StopIteration:
            if self._closed or self._call.complete:
                raise
            self._call.failed(None)
        except grpc.RpcError as error:
            self._call.failed(error)
        else:
            self._ready.extend(self._call.take(response))
            return
        self._channel.sleep(self._call.pause)
        if not self._closed:
            self._responses = self._channel.responses(self._call)

    def result(self) -> ResultT:
        """Wait for the rest of the stream and return the whole result.

        Raises:
            StreamInterrupted: The stream was interrupted or closed before its summary.
            JanuslensError: The call failed; `partial` has what was received.
        """
        for _ in self:
            pass
        return self._call.result()

    def close(self) -> None:
        """Cancel the call if it is still running; the server stops computing."""
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


@dataclass(frozen=True)
class Generation(GeneratedText):
    """A generated text, with methods that explain its tokens."""

    client: Client = field(repr=False, compare=False)
    changes: tuple[interventions_pb2.Intervention, ...] = field(repr=False, compare=False)

    def trace(self, token: int = -1, target: TargetLike | None = None, **options: Any) -> Trace:
        """Trace the forward pass that predicted a generated token.

        Args:
            token: Number of the generated token, from 0, or negative from the end.
            target: The token whose rank every projection reports; None = the generated token.
            options: Further arguments of `trace`; by default, the pass has the interventions of the
                generation.

        Raises:
            IndexError: There is no such token.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        ids = self.ids_before(token)
        wanted = self.tokens[token].token.id if target is None else target
        return self.client.trace(ids, wanted, **self._same_pass() | options)

    def gradient(
        self, token: int = -1, target: TargetLike | None = None, **options: Any
    ) -> Gradient:
        """Compute the gradients of a generated token's loss, or of another token in its place.

        Args:
            token: Number of the generated token, from 0, or negative from the end.
            target: The target of the loss; None = the generated token.
            options: Further arguments of `gradient_lens`; by default, the pass has the
                interventions of the generation.

        Raises:
            IndexError: There is no such token.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        ids = self.ids_before(token)
        wanted = self.tokens[token].token.id if target is None else target
        return self.client.gradient_lens(ids, wanted, **self._same_pass() | options)

    def _same_pass(self) -> dict[str, Any]:
        """Name the model and revision that generated the text, and the interventions."""
        changes = Intervention(self.changes)
        return {
            "model": self.provenance.model,
            "revision": self.provenance.revision,
            "interventions": [counted_from_start(changes, len(self.prompt_tokens))],
        }

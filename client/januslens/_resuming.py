"""Make a call, and resume it at another replica where the client has `resume=True`.

gRPC itself retries a call that no server has begun to serve. The headers of a server mark that it
has begun, and from then on nothing is retried silently: an interrupted call raises, or, with
`resume=True`, is requested again under an id of its own, with a warning in the log `januslens`. Of
a stream only the missing layers are requested, and the messages of both calls are joined: pieces of
a layer or matrix are held until it is whole, what has arrived already is dropped, a token's text
comes once, and `sequence` counts on.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import grpc
from google.protobuf.message import Message

from januslens._assemblers import Assembler, EventT, ResponseT, ResultT
from januslens._connection import Attempt, Connection
from januslens._status import FailedCall, was_cut
from januslens.errors import JanuslensError, StreamInterrupted, Unavailable
from januslens.v1 import common_pb2, gradient_lens_pb2, trace_pb2

RequestT = TypeVar("RequestT", bound=Message)
PartT = TypeVar("PartT", bound=Any)


class OtherAnswer(Exception):
    """The other replica answers another question: its parts would not fit."""


class Splice(ABC, Generic[RequestT, PartT]):
    """Takes each call's messages and gives back those of the one stream."""

    def __init__(self, request: RequestT) -> None:
        """`request` is the first call's."""
        self._request = request
        self._header: Any = None
        self._held: list[PartT] = []
        self._named: set[int] = set()
        self._given = 0

    def restart(self) -> None:
        """Another call begins: pieces of what was not whole are of no use."""
        self._held.clear()

    def take(self, response: PartT) -> list[PartT]:
        """The next messages of the one stream; none while they are held, or known already.

        Raises:
            OtherAnswer: The call runs on other weights or tokens than the first one did.
        """
        match response.WhichOneof("event"):
            case "header":
                given = self._take_header(response)
            case "summary":
                given = [self._sum_up(response)]
            case None:  # an event of a newer server's
                given = [response]
            case _:
                given = self._take_part(response)
        for message in given:
            message.sequence = self._given
            self._given += 1
        return given

    @abstractmethod
    def rest(self) -> RequestT:
        """What to ask another replica for."""

    @abstractmethod
    def _take_part(self, response: PartT) -> list[PartT]:
        """A layer or matrix, or a piece of one."""

    @abstractmethod
    def _sum_up(self, response: PartT) -> PartT:
        """The summary, with the counts of the whole."""

    @abstractmethod
    def _targets(self, header: Any) -> list[int]:
        """The tokens that the stream is about."""

    def _take_header(self, response: PartT) -> list[PartT]:
        if self._header is not None:
            self._compare(response.header)
            return []
        self._header = response.header
        self._named.update(token.id for token in response.header.prompt_tokens)
        self._named.update(token.id for token in response.header.tokens)
        return [response]

    def _compare(self, header: Any) -> None:
        for what, read in (
            ("revision", lambda h: h.provenance.revision),
            ("prompt tokens", lambda h: [token.id for token in h.prompt_tokens]),
            ("targets", self._targets),
        ):
            expected, got = read(self._header), read(header)
            if expected != got:
                raise OtherAnswer(f"expected {what} {expected} of the other replica; got {got}")

    def _unnamed(self, tokens: Iterable[common_pb2.Token]) -> list[common_pb2.Token]:
        """Those whose texts have not come."""
        fresh = [token for token in tokens if token.id not in self._named]
        self._named.update(token.id for token in fresh)
        return fresh

    def _again(self) -> RequestT:
        """The request, for the very weights that answered first."""
        request = type(self._request)()
        request.CopyFrom(self._request)
        if self._header is not None:
            provenance = self._header.provenance
            request.model, request.revision = provenance.model, provenance.revision  # type: ignore[attr-defined]  # every request of a stream names them
        return request


def replace_all(field: Any, values: list[Any]) -> None:
    """Give a repeated field other values."""
    del field[:]
    field.extend(values)


class TraceSplice(Splice[trace_pb2.TraceRequest, trace_pb2.TraceResponse]):
    """Asks for the layers that are missing.

    A trace that begins above layer 0 brings the input of its first layer, which the cut one has as
    the output of the layer below: it is dropped. Where layers between were not asked for, the last
    one that came is asked for again and dropped, so that the GAP edge to it comes as it would have.
    """

    def __init__(self, request: trace_pb2.TraceRequest) -> None:
        super().__init__(request)
        self._layers: list[int] = []
        self._nodes: set[str] = set()
        self._edges = 0

    def rest(self) -> trace_pb2.TraceRequest:
        """The missing layers, on the same weights and for the same target."""
        request = self._again()
        if self._header is None:
            return request
        targets = set(self._targets(self._header))
        if not request.HasField("target") and len(targets) == 1:
            request.target.token_ids.ids.extend(targets)
        # What is checked on this very request is checked over all its layers.
        whole = request.include_checks or not self._layers
        replace_all(request.layers, list(self._header.layers) if whole else self._missing())
        return request

    def _missing(self) -> list[int]:
        below = self._layers[-1]
        missing = [layer for layer in self._header.layers if layer > below]
        return missing if missing and missing[0] == below + 1 else [below, *missing]

    def _take_part(self, response: trace_pb2.TraceResponse) -> list[trace_pb2.TraceResponse]:
        if response.layer.layer in self._layers:
            return []
        self._held.append(response)
        if not response.layer.last:
            return []
        whole, self._held = self._held, []
        self._layers.append(response.layer.layer)
        for piece in whole:
            self._join(piece.layer)
        return whole

    def _join(self, piece: trace_pb2.LayerGraph) -> None:
        replace_all(piece.nodes, [n for n in piece.nodes if n.id not in self._nodes])
        replace_all(piece.tokens, self._unnamed(piece.tokens))
        self._nodes.update(node.id for node in piece.nodes)
        self._edges += len(piece.edges)

    def _sum_up(self, response: trace_pb2.TraceResponse) -> trace_pb2.TraceResponse:
        response.summary.nodes, response.summary.edges = len(self._nodes), self._edges
        return response

    def _targets(self, header: Any) -> list[int]:
        return [target.target_token_id for target in header.targets]


_Key = tuple[int, int, int | None]


class GradientSplice(
    Splice[gradient_lens_pb2.GradientLensRequest, gradient_lens_pb2.GradientLensResponse]
):
    """Asks for the layers that are missing, the one that was cut included.

    Which matrices a layer has is the server's to know: those of the cut layer that had come are
    dropped. A table of segments is made over all matrices, so with a subject all are asked for.
    """

    def __init__(self, request: gradient_lens_pb2.GradientLensRequest) -> None:
        super().__init__(request)
        self._matrices: list[_Key] = []

    def rest(self) -> gradient_lens_pb2.GradientLensRequest:
        """The layers from the one that was cut down, on the same weights."""
        request = self._again()
        if self._matrices and not request.HasField("subject"):
            cut = self._matrices[-1][0]
            asked = request.layers or range(cut + 1)
            replace_all(request.layers, sorted(layer for layer in set(asked) if layer <= cut))
        return request

    def _take_part(
        self, response: gradient_lens_pb2.GradientLensResponse
    ) -> list[gradient_lens_pb2.GradientLensResponse]:
        matrix = response.matrix
        key = (matrix.layer, matrix.kind, matrix.expert if matrix.HasField("expert") else None)
        if key in self._matrices:
            return []
        self._held.append(response)
        if not matrix.last:
            return []
        whole, self._held = self._held, []
        self._matrices.append(key)
        for piece in whole:
            replace_all(piece.matrix.tokens, self._unnamed(piece.matrix.tokens))
        return whole

    def _sum_up(
        self, response: gradient_lens_pb2.GradientLensResponse
    ) -> gradient_lens_pb2.GradientLensResponse:
        response.summary.matrices = len(self._matrices)
        return response

    def _targets(self, header: Any) -> list[int]:
        return list(header.target_token_ids)


ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class UnaryCall:
    """One message out, one back. `timeout` in seconds, None = the client's."""

    method: str
    request: Message
    timeout: float | None


@dataclass(frozen=True)
class StreamCall(Generic[ResponseT, EventT, ResultT]):
    """One message out, a stream back. `timeout` in seconds, None = the client's.

    `splice` joins the answers of several calls, where the client resumes what was cut.
    """

    method: str
    request: Message
    timeout: float | None
    assembler: Assembler[ResponseT, EventT, ResultT]
    splice: Splice[Any, ResponseT]


# The responses sent into it are of the type that belongs to the method just yielded.
Exchange = Generator[UnaryCall, Any, ReturnT]


logger = logging.getLogger("januslens")

# How many calls in a row may fail before they have brought anything new. The first is made at once,
# the others after 1, 2, 4 seconds: a server that is started again needs some.
FRUITLESS = 4


class ResumableCall:
    """The calls made so far for one question, and what the next one is to be."""

    def __init__(self, connection: Connection, call: UnaryCall | StreamCall[Any, Any, Any]) -> None:
        self.connection = connection
        self.method = call.method
        self.request: Message = call.request
        self.attempt = Attempt(connection)
        seconds = connection.seconds(call.timeout)
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._fruitless = 0

    @property
    def timeout(self) -> float | None:
        """Seconds that are left for the next call."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def cut(self, error: grpc.RpcError) -> None:
        """A call failed: get ready for the next one, or raise what ends the course.

        Raises:
            JanuslensError: The failure, unless it is one that the client resumes from.
        """
        call = cast("FailedCall", error)
        failure = self.attempt.failure(call)
        if not (self.connection.resume and was_cut(call) and self._hopeful()):
            raise failure from error
        self._again(failure)

    @property
    def pause(self) -> float:
        """Seconds to wait before the next call."""
        return 0.0 if self._fruitless < 2 else 2.0 ** (self._fruitless - 2)

    def _hopeful(self) -> bool:
        self._fruitless += 1
        return self._fruitless <= FRUITLESS

    def _again(self, failure: JanuslensError) -> None:
        before, self.attempt = self.attempt, Attempt(self.connection)
        logger.warning(
            "%s %s was cut (%s: %s); going on as %s",
            self.method,
            before.request_id,
            failure.code,
            failure.message,
            self.attempt.request_id,
        )


class ResumableStream(ResumableCall, Generic[EventT, ResultT]):
    """A course whose calls stream."""

    def __init__(self, connection: Connection, call: StreamCall[Any, EventT, ResultT]) -> None:
        super().__init__(connection, call)
        self.interruptions: list[StreamInterrupted] = []
        self._assembler = call.assembler
        self._splice = call.splice if connection.resume else None
        self._due = 0

    def take(self, response: Any) -> list[EventT]:
        """The events that the next message completes.

        Raises:
            ProtocolViolation: It is not the next message, or does not continue the one before.
            StreamInterrupted: Another replica answered, but not the same.
        """
        if response.sequence != self._due:
            raise self._assembler.violation(
                f"expected message {self._due} of the stream; got {response.sequence}"
            )
        self._due += 1
        events = (self._read(message) for message in self._joined(response))
        return [event for event in events if event is not None]

    def _joined(self, response: Any) -> list[Any]:
        if self._splice is None:
            return [response]
        try:
            return self._splice.take(response)
        except OtherAnswer as error:
            raise self._assembler.interruption(str(error)) from error

    def _read(self, message: Any) -> EventT | None:
        self._fruitless = 0
        self.connection.seen(message)
        return self._assembler.feed(message)

    def result(self) -> ResultT:
        """The whole, once it has come.

        Raises:
            StreamInterrupted: It has not.
        """
        return self._assembler.result()

    @property
    def complete(self) -> bool:
        """Whether the summary has come."""
        return self._assembler.complete

    def cut(self, error: grpc.RpcError | None) -> None:
        """A call failed, or ended (None) before its summary; else as for any course."""
        if error is None:
            failure: JanuslensError = self._assembler.interruption()
        else:
            failure = self.attempt.failure(
                cast("FailedCall", error), self._assembler.partial(), self._assembler.interrupted
            )
        if isinstance(failure, StreamInterrupted):
            resumable = True
            self.interruptions.append(failure)
        else:  # no other replica is there yet
            resumable = bool(self.interruptions) and isinstance(failure, Unavailable)
        if self._splice is None or not resumable or not self._hopeful():
            raise failure from error
        self._splice.restart()
        self.request, self._due = self._splice.rest(), 0
        self._again(failure)

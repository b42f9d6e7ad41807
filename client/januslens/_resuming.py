"""Resume interrupted calls on another replica if the client has `resume=True`.

gRPC retries a call until it receives the server's headers, that is, until the call is admitted.
If an admitted call is interrupted, it raises an exception or, with `resume=True`, is repeated with
a new request id, and the logger `januslens` writes a warning.

A repeated Trace or GradientLens requests only the missing layers. Its messages are joined to those
received before: the parts of a layer, matrix or tensor are held until it is complete, duplicates
are dropped, the text of each token is kept once, and `sequence` continues.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

import grpc
from google.protobuf.message import Message

from januslens._connection import Attempt, Connection, FailedCall, was_cut
from januslens.assemblers import Assembler, EventT, ResultT, is_waiting
from januslens.errors import JanuslensError, StreamInterrupted, Unavailable
from januslens.results.activations import tensor_name
from januslens.v1 import (
    activations_pb2,
    common_pb2,
    generation_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    trace_pb2,
)

RequestT = TypeVar("RequestT", bound=Message)
PartT = TypeVar("PartT", bound=Any)


class DifferentAnswer(Exception):
    """The other replica gives a different result: other weights, prompt tokens or targets."""


class Splice(ABC, Generic[RequestT, PartT]):
    """Joins the messages of several attempts to those of one uninterrupted stream."""

    def __init__(self, request: RequestT) -> None:
        """`request` is the request of the first attempt."""
        self._request = request
        self._header: Any = None
        self._held: list[PartT] = []
        self._named: set[int] = set()
        self._given = 0

    def take(self, response: PartT) -> list[PartT]:
        """Take a message; return the messages that it adds to the joined stream.

        Raises:
            DifferentAnswer: This attempt has other weights, prompt tokens or targets.
        """
        match response.WhichOneof("event"):
            case "header":
                given = self._take_header(response)
            case "summary":
                given = [self._sum_up(response)]
            case None:  # an event that only newer servers send
                given = [response]
            case _:
                given = self._take_part(response)
        for message in given:
            message.sequence = self._given
            self._given += 1
        return given

    @abstractmethod
    def rest(self) -> RequestT:
        """Return the request for the missing part; discard incomplete layers and matrices."""

    @abstractmethod
    def _take_part(self, response: PartT) -> list[PartT]:
        """Take a message with a layer or matrix, or with a part of one."""

    @abstractmethod
    def _sum_up(self, response: PartT) -> PartT:
        """Set the summary's counts to those of the joined stream."""

    @abstractmethod
    def _targets(self, header: Any) -> list[int]:
        """Return the target token ids of a header."""

    def _take_header(self, response: PartT) -> list[PartT]:
        if self._header is not None:
            self._compare(response.header)
            return []
        self._header = response.header
        self._named.update(token.id for token in response.header.prompt_tokens)
        self._named.update(token.id for token in getattr(response.header, "tokens", ()))
        return [response]

    def _compare(self, header: Any) -> None:
        for what, read in (
            ("revision", lambda h: h.provenance.revision),
            ("prompt tokens", lambda h: [token.id for token in h.prompt_tokens]),
            ("targets", self._targets),
        ):
            expected, got = read(self._header), read(header)
            if expected != got:
                raise DifferentAnswer(f"the other replica has {what} {got}, not {expected}")

    def _unnamed(self, tokens: Iterable[common_pb2.Token]) -> list[common_pb2.Token]:
        """Return the tokens whose texts are not in the joined stream yet."""
        fresh = [token for token in tokens if token.id not in self._named]
        self._named.update(token.id for token in fresh)
        return fresh

    def _pinned_request(self) -> RequestT:
        """Copy the request, pinned to the model and revision of the first answer."""
        self._held.clear()
        request = type(self._request)()
        request.CopyFrom(self._request)
        if self._header is not None:
            provenance = self._header.provenance
            request.model, request.revision = provenance.model, provenance.revision  # type: ignore[attr-defined]  # every request of a stream names them
        return request


def replace_all(field: Any, values: list[Any]) -> None:
    """Replace the values of a repeated field."""
    del field[:]
    field.extend(values)


class TraceSplice(Splice[trace_pb2.TraceRequest, trace_pb2.TraceResponse]):
    """Splice of a Trace; requests the missing layers.

    A repeated trace begins with the input of its first layer. This vector has already been
    received as the output of the layer below, so it is dropped. If the layer below was not
    requested, the trace needs a GAP edge to its first missing layer. To obtain it, the last
    received layer is requested again, and then dropped.
    """

    def __init__(self, request: trace_pb2.TraceRequest) -> None:
        super().__init__(request)
        self._layers: list[int] = []
        self._nodes: set[str] = set()
        self._edges = 0

    def rest(self) -> trace_pb2.TraceRequest:
        """Return a request for the missing layers, with the same revision and target."""
        request = self._pinned_request()
        if self._header is None:
            return request
        targets = set(self._targets(self._header))
        if not request.HasField("target") and len(targets) == 1:
            request.target.token_ids.ids.extend(targets)
        # The checks cover all requested layers, so all of them must be computed again.
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


class GradientSplice(
    Splice[gradient_lens_pb2.GradientLensRequest, gradient_lens_pb2.GradientLensResponse]
):
    """Splice of a GradientLens; requests the missing layers and the incomplete one.

    Only the server knows which matrices a layer has, so matrices of the incomplete layer that have
    arrived are dropped. The table of segments covers all matrices, so a request with a subject is
    repeated in full.
    """

    def __init__(self, request: gradient_lens_pb2.GradientLensRequest) -> None:
        super().__init__(request)
        self._attention: list[int] = []
        self._matrices: list[tuple[int, int, str, int | None]] = []

    def rest(self) -> gradient_lens_pb2.GradientLensRequest:
        """Return a request for the incomplete layer and those below it, with the same revision."""
        request = self._pinned_request()
        if self._matrices and not request.HasField("subject"):
            incomplete = self._matrices[-1][0]
            wanted = request.layers or range(incomplete + 1)
            missing = sorted(layer for layer in set(wanted) if layer <= incomplete)
            replace_all(request.layers, missing)
        return request

    def _take_part(
        self, response: gradient_lens_pb2.GradientLensResponse
    ) -> list[gradient_lens_pb2.GradientLensResponse]:
        if response.HasField("attention"):
            return self._take_attention(response)
        matrix = response.matrix
        expert = matrix.expert if matrix.HasField("expert") else None
        key = (matrix.layer, matrix.kind, matrix.module, expert)
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

    def _take_attention(
        self, response: gradient_lens_pb2.GradientLensResponse
    ) -> list[gradient_lens_pb2.GradientLensResponse]:
        piece = response.attention
        if piece.layer in self._attention:
            return []
        self._held.append(response)
        if piece.offset + math.prod(piece.pattern.shape) < math.prod(piece.shape):
            return []
        whole, self._held = self._held, []
        self._attention.append(piece.layer)
        return whole

    def _sum_up(
        self, response: gradient_lens_pb2.GradientLensResponse
    ) -> gradient_lens_pb2.GradientLensResponse:
        response.summary.matrices = len(self._matrices)
        return response

    def _targets(self, header: Any) -> list[int]:
        return list(header.target_token_ids)


class ActivationsSplice(
    Splice[activations_pb2.ActivationsRequest, activations_pb2.ActivationsResponse]
):
    """Splice of Activations; requests all tensors again and drops those received before.

    The server chooses the layers that have a site, so the client does not know what is missing.
    """

    def __init__(self, request: activations_pb2.ActivationsRequest) -> None:
        super().__init__(request)
        self._whole: set[str] = set()
        self._messages = 0

    def rest(self) -> activations_pb2.ActivationsRequest:
        """Return the whole request, with the same revision."""
        return self._pinned_request()

    def _take_part(
        self, response: activations_pb2.ActivationsResponse
    ) -> list[activations_pb2.ActivationsResponse]:
        tensor = response.tensor
        name = tensor_name(tensor)
        if name in self._whole:
            return []
        self._held.append(response)
        if tensor.offset + math.prod(tensor.piece.shape) < math.prod(tensor.shape):
            return []
        pieces, self._held = self._held, []
        self._whole.add(name)
        self._messages += len(pieces)
        return pieces

    def _sum_up(
        self, response: activations_pb2.ActivationsResponse
    ) -> activations_pb2.ActivationsResponse:
        response.summary.messages = self._messages
        return response

    def _targets(self, _header: Any) -> list[int]:
        return []


class InterveneSplice(Splice[intervene_pb2.InterveneRequest, intervene_pb2.InterveneResponse]):
    """Splice of Intervene; requests all experiments again and drops the effects received before.

    The server numbers the experiments of a sweep, so a request for a part would renumber them.
    """

    def __init__(self, request: intervene_pb2.InterveneRequest) -> None:
        super().__init__(request)
        self._experiments: set[int] = set()
        self._texts: list[common_pb2.Token] = []

    def rest(self) -> intervene_pb2.InterveneRequest:
        """Return the whole request, with the same revision."""
        return self._pinned_request()

    def _take_header(
        self, response: intervene_pb2.InterveneResponse
    ) -> list[intervene_pb2.InterveneResponse]:
        given = super()._take_header(response)
        if given:
            self._named.update(token.id for token in response.tokens)
        else:
            self._texts.extend(response.tokens)
        return given

    def _take_part(
        self, response: intervene_pb2.InterveneResponse
    ) -> list[intervene_pb2.InterveneResponse]:
        self._texts.extend(response.tokens)
        if response.effect.experiment in self._experiments:
            return []
        self._experiments.add(response.effect.experiment)
        texts, self._texts = self._texts, []
        replace_all(response.tokens, self._unnamed(texts))
        return [response]

    def _sum_up(self, response: intervene_pb2.InterveneResponse) -> intervene_pb2.InterveneResponse:
        return response

    def _targets(self, header: Any) -> list[int]:
        return [outcome.target_token_id for outcome in header.before]


class GenerateSplice(Splice[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]):
    """Splice of a Generate; repeats it from the prompt, since a seed draws the same tokens again.

    The tokens that have been received are compared and dropped.
    """

    def __init__(self, request: generation_pb2.GenerateRequest) -> None:
        super().__init__(request)
        self._ids: list[int] = []
        self._repeated = 0

    def rest(self) -> generation_pb2.GenerateRequest:
        """Return the same request with the same revision."""
        self._repeated = 0
        return self._pinned_request()

    def _take_header(
        self, response: generation_pb2.GenerateResponse
    ) -> list[generation_pb2.GenerateResponse]:
        if self._header is not None:
            self._compare(response.header)
            return []
        self._header = response.header
        self._named.update(token.id for token in response.header.prompt_tokens)
        return [response]

    def _take_part(
        self, response: generation_pb2.GenerateResponse
    ) -> list[generation_pb2.GenerateResponse]:
        number, drawn = self._repeated, response.generated.token.id
        self._repeated += 1
        if number < len(self._ids):
            if drawn != self._ids[number]:
                raise DifferentAnswer(
                    f"the other replica generates token {drawn}, not {self._ids[number]}"
                )
            return []
        self._ids.append(drawn)
        replace_all(response.tokens, self._unnamed(response.tokens))
        return [response]

    def _sum_up(self, response: generation_pb2.GenerateResponse) -> generation_pb2.GenerateResponse:
        return response

    def _targets(self, header: Any) -> list[int]:  # noqa: ARG002 - a generation has none
        return []


SPLICES: Mapping[str, Callable[[Any], Splice[Any, Any]]] = {
    "Trace": TraceSplice,
    "GradientLens": GradientSplice,
    "Generate": GenerateSplice,
    "Activations": ActivationsSplice,
    "Intervene": InterveneSplice,
}

logger = logging.getLogger("januslens")

# Maximum number of consecutive failed attempts without a new message. The first retry follows at
# once, the others after 1, 2 and 4 seconds, which gives a server time to restart.
MAX_FRUITLESS_ATTEMPTS = 4


class ResumableCall:
    """A call, which may need several attempts if the client has `resume=True`."""

    def __init__(
        self, connection: Connection, method: str, request: Message, timeout: float | None
    ) -> None:
        """`timeout` is in seconds; None = the client's."""
        self.connection = connection
        self.method = method
        self.request = request
        self.attempt = Attempt(connection)
        seconds = connection.seconds(timeout)
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._fruitless = 0

    @property
    def timeout(self) -> float | None:
        """Seconds left for the next attempt."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def pause(self) -> float:
        """Seconds to wait before the next attempt."""
        return 0.0 if self._fruitless < 2 else 2.0 ** (self._fruitless - 2)

    def failed(self, error: grpc.RpcError) -> None:
        """Prepare another attempt after `error`.

        Raises:
            JanuslensError: The call is not resumed.
        """
        call = cast("FailedCall", error)
        failure = self.attempt.failure(call)
        if not (self.connection.resume and was_cut(call) and self._may_retry):
            raise failure from error
        self._prepare_attempt(failure)

    @property
    def _may_retry(self) -> bool:
        return self._fruitless < MAX_FRUITLESS_ATTEMPTS

    def _prepare_attempt(self, failure: JanuslensError) -> None:
        self._fruitless += 1
        before, self.attempt = self.attempt, Attempt(self.connection)
        logger.warning(
            "%s %s was interrupted (%s: %s); resuming as %s",
            self.method,
            before.request_id,
            failure.code,
            failure.message,
            self.attempt.request_id,
        )


class ResumableStream(ResumableCall, Generic[EventT, ResultT]):
    """A streaming call; the messages of its attempts are joined into one stream."""

    def __init__(
        self,
        connection: Connection,
        method: str,
        request: Message,
        timeout: float | None,
        assembler: Assembler[Any, EventT, ResultT],
    ) -> None:
        super().__init__(connection, method, request, timeout)
        self.interruptions: list[StreamInterrupted] = []
        self._assembler = assembler
        self._splice = SPLICES[method](request) if connection.resume else None
        self._due = 0

    def take(self, response: Any) -> list[EventT]:
        """Take the next message; return the events that it completes.

        Raises:
            ProtocolViolation: The message is out of order, or does not continue the one before.
            StreamInterrupted: Another replica gives a different result.
        """
        if is_waiting(response):
            self.connection.waits(response.waiting)
            shown = self._assembler.feed(response)
            return [] if shown is None else [shown]
        self._assembler.check_sequence(response, self._due)
        self._due += 1
        events = (self._read(message) for message in self._joined(response))
        return [event for event in events if event is not None]

    def _joined(self, response: Any) -> list[Any]:
        if self._splice is None:
            return [response]
        try:
            return self._splice.take(response)
        except DifferentAnswer as error:
            raise self._assembler.interruption(str(error)) from error

    def _read(self, message: Any) -> EventT | None:
        self._fruitless = 0
        self.connection.seen(message)
        return self._assembler.feed(message)

    def result(self) -> ResultT:
        """Return the whole result.

        Raises:
            StreamInterrupted: The summary has not arrived.
        """
        return self._assembler.result()

    @property
    def complete(self) -> bool:
        """Whether the summary has arrived."""
        return self._assembler.complete

    def failed(self, error: grpc.RpcError | None) -> None:
        """Prepare another attempt after `error`; None = the stream ended before its summary.

        Raises:
            JanuslensError: The call is not resumed.
        """
        failure = self._failure(error)
        interrupted = isinstance(failure, StreamInterrupted)
        if interrupted:
            self.interruptions.append(cast("StreamInterrupted", failure))
        # An interrupted call also waits until a replica is available.
        waiting = bool(self.interruptions) and isinstance(failure, Unavailable)
        if self._splice is None or not (interrupted or waiting) or not self._may_retry:
            raise failure from error
        self._prepare_attempt(failure)
        self.request, self._due = self._splice.rest(), 0

    def _failure(self, error: grpc.RpcError | None) -> JanuslensError:
        if error is None:
            return self._assembler.interruption()
        call = cast("FailedCall", error)
        return self.attempt.failure(call, self._assembler.partial(), self._assembler.interrupted)

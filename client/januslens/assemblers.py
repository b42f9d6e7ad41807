"""Assemble the messages of a stream into a result, and read recorded streams.

Messages are numbered from 0 in `sequence`. A layer or a matrix may span several messages, the last
of which is marked. The text of a token is sent once, in the first message that needs it. A stream
without its summary is incomplete.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from google.protobuf.json_format import Parse

from januslens.errors import (
    ActivationsInterrupted,
    ErrorDetails,
    GenerationInterrupted,
    GradientInterrupted,
    InterveneInterrupted,
    ProtocolViolation,
    StreamInterrupted,
    TraceInterrupted,
)
from januslens.results.activations import (
    Activations,
    ActivationsHeader,
    ActivationsSummary,
    SiteTensor,
    tensor_name,
)
from januslens.results.attention import AttentionGradient
from januslens.results.generation import (
    GeneratedText,
    GeneratedToken,
    GenerationHeader,
    GenerationSummary,
)
from januslens.results.gradient import Gradient, GradientHeader, GradientSummary
from januslens.results.intervene import (
    InterveneHeader,
    InterveneSummary,
    InterventionEffect,
    InterventionEffects,
)
from januslens.results.matrices import Matrix, kind_of, matrix_name
from januslens.results.tokens import Token, TokenTable
from januslens.results.trace import LayerGraph, Trace, TraceHeader, TraceSummary
from januslens.v1 import (
    activations_pb2,
    generation_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    streams_pb2,
    trace_pb2,
)


class Sequenced(Protocol):
    """A message of a stream."""

    @property
    def sequence(self) -> int:
        """The number of the message in its stream, from 0."""

    def WhichOneof(self, oneof_group: Literal["event"]) -> str | None:  # noqa: N802 - protobuf's
        """Return the name of the field of the event that is set."""


def is_waiting(response: Sequenced) -> bool:
    """Whether a message was sent while its request waited for the device."""
    return response.WhichOneof("event") == "waiting"


ResponseT = TypeVar("ResponseT", bound=Sequenced)
EventT = TypeVar("EventT")
ResultT = TypeVar("ResultT")


class Assembler(ABC, Generic[ResponseT, EventT, ResultT]):
    """Takes the messages of a stream one by one, and returns each event when it is complete."""

    interrupted: ClassVar[type[StreamInterrupted]]

    def __init__(self) -> None:
        self.received = 0
        self.tokens = TokenTable()
        self.request_id = ""

    def feed(self, response: ResponseT) -> EventT | None:
        """Take the next message; return the event that it completes, or None.

        Messages about a request that waits are no part of the result.

        Raises:
            ProtocolViolation: The message is out of order, or does not continue the one before.
        """
        if is_waiting(response):
            return self._read_waiting(response)
        self.check_sequence(response, self.received)
        self.received += 1
        return self._read(response)

    def result(self) -> ResultT:
        """Return the whole result.

        Raises:
            StreamInterrupted: The summary is missing; `partial` has what was received.
            ProtocolViolation: The header is missing.
        """
        if not self.complete:
            raise self.interruption()
        whole = self.partial()
        if whole is None:
            raise self.violation("the stream has a summary but no header")
        return whole

    def interruption(self, text: str | None = None) -> StreamInterrupted:
        """Return the error for a stream that ends before its summary."""
        details = ErrorDetails("DATA_LOSS", "STREAM_INTERRUPTED", self.request_id, retry_after=0.0)
        came = f"the stream ended after {self.received} messages, without its summary"
        return self.interrupted(text or came, details, self.partial())

    def check_sequence(self, response: ResponseT, due: int) -> None:
        """Check that a message is the next one of its stream.

        Raises:
            ProtocolViolation: It is not.
        """
        if (number := response.sequence) != due:
            raise self.violation(f"unexpected message {number} of the stream; expected {due}")

    def violation(self, text: str) -> ProtocolViolation:
        """Return the error for a stream that violates the contract."""
        details = ErrorDetails("DATA_LOSS", "PROTOCOL_VIOLATION", self.request_id)
        return ProtocolViolation(text, details, self.partial())

    @abstractmethod
    def partial(self) -> ResultT | None:
        """Return the received part of the result; None before the header."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the summary has been received."""

    def _read_waiting(self, _response: ResponseT) -> EventT | None:
        """Read a message that was sent while the request waited for the device."""
        return None

    @abstractmethod
    def _read(self, response: ResponseT) -> EventT | None:
        """Read a message that is in order; return None if it does not complete an event."""


TraceEvent = TraceHeader | LayerGraph | TraceSummary


class TraceAssembler(Assembler[trace_pb2.TraceResponse, TraceEvent, Trace]):
    """Joins the messages of a Trace into its header, layers and summary."""

    interrupted = TraceInterrupted

    def __init__(self) -> None:
        super().__init__()
        self.responses: list[trace_pb2.TraceResponse] = []
        self._header: trace_pb2.TraceHeader | None = None
        self._layers: list[LayerGraph] = []
        self._summary: TraceSummary | None = None
        self._pending: trace_pb2.LayerGraph | None = None

    def partial(self) -> Trace | None:
        """Return the layers that are complete so far; None before the header."""
        if self._header is None:
            return None
        # Read the header again: the text of a target may have arrived with a layer.
        header = TraceHeader.from_message(self._header, self.tokens)
        return Trace.from_parts(header, self._layers, self._summary, self.responses)

    @property
    def complete(self) -> bool:
        """Whether the summary has been received."""
        return self._summary is not None

    def _read(self, response: trace_pb2.TraceResponse) -> TraceEvent | None:
        self.responses.append(response)
        match response.WhichOneof("event"):
            case "header":
                return self._read_header(response.header)
            case "layer":
                return self._read_layer(response.layer)
            case "summary":
                return self._read_summary(response.summary)
            case _:  # an event that only newer servers send
                return None

    def _read_header(self, message: trace_pb2.TraceHeader) -> TraceHeader:
        self._header = message
        self.request_id = message.request_id
        self.tokens.add(message.prompt_tokens)
        self.tokens.add(message.tokens)
        return TraceHeader.from_message(message, self.tokens)

    def _read_layer(self, message: trace_pb2.LayerGraph) -> LayerGraph | None:
        self.tokens.add(message.tokens)
        if self._pending is None:
            self._pending = trace_pb2.LayerGraph()
        elif self._pending.layer != message.layer:
            raise self.violation(
                f"layer {message.layer} began before the end of layer {self._pending.layer}"
            )
        self._pending.MergeFrom(message)
        if not message.last:
            return None
        sent = () if self._header is None else self._header.prompt_tokens
        prompt = tuple(Token.from_message(token) for token in sent)
        layer = LayerGraph.from_message(self._pending, self.tokens, self._layers, prompt)
        self._pending = None
        self._layers.append(layer)
        return layer

    def _read_summary(self, message: trace_pb2.TraceSummary) -> TraceSummary:
        if self._pending is not None:
            raise self.violation(f"the stream ended before the end of layer {self._pending.layer}")
        self._summary = TraceSummary.from_message(message)
        return self._summary


GradientEvent = GradientHeader | AttentionGradient | Matrix | GradientSummary


class GradientAssembler(Assembler[gradient_lens_pb2.GradientLensResponse, GradientEvent, Gradient]):
    """Joins the messages of a GradientLens into its header, attention, matrices and summary."""

    interrupted = GradientInterrupted

    def __init__(self) -> None:
        super().__init__()
        self.responses: list[gradient_lens_pb2.GradientLensResponse] = []
        self._header: gradient_lens_pb2.GradientHeader | None = None
        self._attention: list[AttentionGradient] = []
        self._pieces: list[gradient_lens_pb2.AttentionGradient] = []
        self._matrices: list[Matrix] = []
        self._summary: GradientSummary | None = None
        self._pending: gradient_lens_pb2.GradientMatrix | None = None

    def partial(self) -> Gradient | None:
        """Return what is complete so far; None before the header."""
        if self._header is None:
            return None
        # Read the header again: the text of a target may have arrived with a matrix.
        header = GradientHeader.from_message(self._header, self.tokens)
        return Gradient.from_parts(
            header, self._attention, self._matrices, self._summary, self.responses
        )

    @property
    def complete(self) -> bool:
        """Whether the summary has been received."""
        return self._summary is not None

    def _read(self, response: gradient_lens_pb2.GradientLensResponse) -> GradientEvent | None:
        self.responses.append(response)
        match response.WhichOneof("event"):
            case "header":
                return self._read_header(response.header)
            case "attention":
                return self._read_attention(response.attention)
            case "matrix":
                return self._read_matrix(response.matrix)
            case "summary":
                return self._read_summary(response.summary)
            case _:  # an event that only newer servers send
                return None

    def _read_header(self, message: gradient_lens_pb2.GradientHeader) -> GradientHeader:
        self._header = message
        self.request_id = message.request_id
        self.tokens.add(message.prompt_tokens)
        self.tokens.add(message.tokens)
        return GradientHeader.from_message(message, self.tokens)

    def _read_attention(
        self, message: gradient_lens_pb2.AttentionGradient
    ) -> AttentionGradient | None:
        self._pieces.append(message)
        due = sum(math.prod(piece.pattern.shape) for piece in self._pieces[:-1])
        layer = self._pieces[0].layer
        if (message.layer, message.offset) != (layer, due):
            raise self.violation(
                f"unexpected element {message.offset} of layer {message.layer}'s attention; "
                f"expected {due} of layer {layer}'s"
            )
        if due + math.prod(message.pattern.shape) < math.prod(message.shape):
            return None
        found = AttentionGradient.from_messages(self._pieces)
        self._pieces = []
        self._attention.append(found)
        return found

    def _read_matrix(self, message: gradient_lens_pb2.GradientMatrix) -> Matrix | None:
        self.tokens.add(message.tokens)
        if self._pending is None:
            self._pending = gradient_lens_pb2.GradientMatrix()
        elif _which(self._pending) != _which(message):
            raise self.violation(
                f"{_which(message)} began before the end of {_which(self._pending)}"
            )
        self._pending.MergeFrom(message)
        if not message.last:
            return None
        matrix = Matrix.from_message(self._pending, self.tokens)
        self._pending = None
        self._matrices.append(matrix)
        return matrix

    def _read_summary(self, message: gradient_lens_pb2.GradientSummary) -> GradientSummary:
        if self._pending is not None:
            raise self.violation(f"the stream ended before the end of {_which(self._pending)}")
        if self._pieces:
            layer = self._pieces[0].layer
            raise self.violation(f"the stream ended before the end of layer {layer}'s attention")
        self._summary = GradientSummary.from_message(message)
        return self._summary


def _which(message: gradient_lens_pb2.GradientMatrix) -> str:
    expert = message.expert if message.HasField("expert") else None
    return matrix_name(message.layer, kind_of(message), expert)


ActivationsEvent = ActivationsHeader | SiteTensor | ActivationsSummary


class ActivationsAssembler(
    Assembler[activations_pb2.ActivationsResponse, ActivationsEvent, Activations]
):
    """Joins the messages of a stream of activations into its header, tensors and summary.

    The messages themselves are not kept, because they would double the memory.
    """

    interrupted = ActivationsInterrupted

    def __init__(self) -> None:
        super().__init__()
        self._header: ActivationsHeader | None = None
        self._tensors: list[SiteTensor] = []
        self._summary: ActivationsSummary | None = None
        self._pending: activations_pb2.SiteTensor | None = None
        self._pieces: list[bytes] = []
        self._due = 0

    def partial(self) -> Activations | None:
        """Return the tensors that are complete so far; None before the header."""
        if self._header is None:
            return None
        return Activations.from_parts(self._header, self._tensors, self._summary)

    @property
    def complete(self) -> bool:
        """Whether the summary has been received."""
        return self._summary is not None

    def _read(self, response: activations_pb2.ActivationsResponse) -> ActivationsEvent | None:
        match response.WhichOneof("event"):
            case "header":
                self._header = ActivationsHeader.from_message(response.header)
                self.request_id = response.header.request_id
                return self._header
            case "tensor":
                return self._read_piece(response.tensor)
            case "summary":
                return self._read_summary(response.summary)
            case _:  # an event that only newer servers send
                return None

    def _read_piece(self, message: activations_pb2.SiteTensor) -> SiteTensor | None:
        if self._pending is None:
            self._pending = message
        expected, got = tensor_name(self._pending), tensor_name(message)
        if (got, message.offset) != (expected, self._due):
            raise self.violation(
                f"unexpected element {message.offset} of {got}; expected {self._due} of {expected}"
            )
        self._pieces.append(message.piece.data)
        self._due += math.prod(message.piece.shape)
        if self._due < math.prod(message.shape):
            return None
        whole = SiteTensor.from_message(message, b"".join(self._pieces))
        self._pending, self._pieces, self._due = None, [], 0
        self._tensors.append(whole)
        return whole

    def _read_summary(self, message: streams_pb2.StreamSummary) -> ActivationsSummary:
        if self._pending is not None:
            name = tensor_name(self._pending)
            raise self.violation(f"the stream ended before the end of {name}")
        self._summary = ActivationsSummary.from_message(message)
        return self._summary


InterveneEvent = InterveneHeader | InterventionEffect | InterveneSummary


class InterveneAssembler(
    Assembler[intervene_pb2.InterveneResponse, InterveneEvent, InterventionEffects]
):
    """Joins the messages of an Intervene into its header, effects and summary."""

    interrupted = InterveneInterrupted

    def __init__(self) -> None:
        super().__init__()
        self.responses: list[intervene_pb2.InterveneResponse] = []
        self._header: InterveneHeader | None = None
        self._effects: list[InterventionEffect] = []
        self._summary: InterveneSummary | None = None

    def partial(self) -> InterventionEffects | None:
        """Return the effects received so far, by number; None before the header."""
        if self._header is None:
            return None
        ordered = sorted(self._effects, key=lambda effect: effect.experiment)
        return InterventionEffects(
            self._header, tuple(ordered), self._summary, tuple(self.responses)
        )

    @property
    def complete(self) -> bool:
        """Whether the summary has been received."""
        return self._summary is not None

    def _read(self, response: intervene_pb2.InterveneResponse) -> InterveneEvent | None:
        self.responses.append(response)
        self.tokens.add(response.tokens)
        match response.WhichOneof("event"):
            case "header":
                self.request_id = response.header.request_id
                self.tokens.add(response.header.prompt_tokens)
                self._header = InterveneHeader.from_message(response.header, self.tokens)
                return self._header
            case "effect":
                effect = InterventionEffect.from_message(response.effect, self.tokens)
                self._effects.append(effect)
                return effect
            case "summary":
                self._summary = InterveneSummary.from_message(response.summary)
                return self._summary
            case _:  # an event that only newer servers send
                return None


GenerationEvent = GenerationHeader | GeneratedToken | GenerationSummary

GeneratedT = TypeVar("GeneratedT", bound=GeneratedText)


class GenerateAssembler(
    Assembler[generation_pb2.GenerateResponse, GenerationEvent, GeneratedT], Generic[GeneratedT]
):
    """Joins the messages of a Generate into its header, tokens and summary."""

    interrupted = GenerationInterrupted

    def __init__(self, make: Callable[..., GeneratedT]) -> None:
        """`make` takes the fields of a `GeneratedText`."""
        super().__init__()
        self.responses: list[generation_pb2.GenerateResponse] = []
        self._make = make
        self._header: GenerationHeader | None = None
        self._generated: list[GeneratedToken] = []
        self._summary: GenerationSummary | None = None

    def partial(self) -> GeneratedT | None:
        """Return the tokens received so far; None before the header."""
        if self._header is None:
            return None
        parts: Sequence[GeneratedToken] = tuple(self._generated)
        return self._make(self._header, parts, self._summary, tuple(self.responses))

    @property
    def complete(self) -> bool:
        """Whether the summary has been received."""
        return self._summary is not None

    def _read(self, response: generation_pb2.GenerateResponse) -> GenerationEvent | None:
        self.responses.append(response)
        self.tokens.add(response.tokens)
        match response.WhichOneof("event"):
            case "header":
                self.request_id = response.header.request_id
                self.tokens.add(response.header.prompt_tokens)
                self._header = GenerationHeader.from_message(response.header)
                return self._header
            case "generated":
                token = GeneratedToken.from_message(response.generated, self.tokens)
                self._generated.append(token)
                return token
            case "summary":
                self._summary = GenerationSummary.from_message(response.summary)
                return self._summary
            case _:  # an event that only newer servers send
                return None


def read_lines(
    lines: Iterable[str],
    message: Callable[[], Any],
    assembler: Assembler[Any, Any, ResultT],
) -> ResultT:
    """Read a recorded stream with one JSON message per line; `message` makes an empty one."""
    for line in lines:
        assembler.feed(Parse(line, message(), ignore_unknown_fields=True))
    return assembler.result()


def read_trace(lines: Iterable[str]) -> Trace:
    """Read a trace from a recorded stream, for example an open file with one message per line.

    Fields that this version of the contract does not have are ignored.

    Raises:
        StreamInterrupted: The recording has no summary; `partial` has what was recorded.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line is not a message of a Trace.
    """
    return read_lines(lines, trace_pb2.TraceResponse, TraceAssembler())


def read_gradient(lines: Iterable[str]) -> Gradient:
    """Read a gradient from a recorded stream, for example an open file with one message per line.

    Fields that this version of the contract does not have are ignored.

    Raises:
        StreamInterrupted: The recording has no summary; `partial` has what was recorded.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line is not a message of a GradientLens.
    """
    return read_lines(lines, gradient_lens_pb2.GradientLensResponse, GradientAssembler())


def read_effects(lines: Iterable[str]) -> InterventionEffects:
    """Read effects from a recorded stream, for example an open file with one message per line.

    Fields that this version of the contract does not have are ignored.

    Raises:
        StreamInterrupted: The recording has no summary; `partial` has what was recorded.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line is not a message of an Intervene.
    """
    return read_lines(lines, intervene_pb2.InterveneResponse, InterveneAssembler())

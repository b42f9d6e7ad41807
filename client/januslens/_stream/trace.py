"""Putting a Trace together."""

from __future__ import annotations

from januslens._results.trace import Trace
from januslens._results.trace_events import LayerGraph, TraceHeader, TraceSummary
from januslens._stream.assembler import Assembler
from januslens.errors import TraceInterrupted
from januslens.v1 import trace_pb2

TraceEvent = TraceHeader | LayerGraph | TraceSummary


class TraceAssembler(Assembler[trace_pb2.TraceResponse, TraceEvent, Trace]):
    """Joins the messages of a Trace into its header, layers and summary."""

    interrupted = TraceInterrupted

    def __init__(self) -> None:
        super().__init__()
        self._header: trace_pb2.TraceHeader | None = None
        self._layers: list[LayerGraph] = []
        self._summary: TraceSummary | None = None
        self._pending: trace_pb2.LayerGraph | None = None

    def partial(self) -> Trace | None:
        """The layers that are complete so far; None before the header."""
        if self._header is None:
            return None
        # Read again at the end: a target's text may have come with a later layer.
        header = TraceHeader.from_message(self._header, self.tokens)
        return Trace.from_parts(header, self._layers, self._summary, self.responses)

    @property
    def complete(self) -> bool:
        """Whether the summary has come."""
        return self._summary is not None

    def _read(self, response: trace_pb2.TraceResponse) -> TraceEvent | None:
        match response.WhichOneof("event"):
            case "header":
                return self._read_header(response.header)
            case "layer":
                return self._read_layer(response.layer)
            case "summary":
                return self._read_summary(response.summary)
            case _:  # an event of a newer server's
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
                f"expected the rest of layer {self._pending.layer}; got layer {message.layer}"
            )
        self._pending.MergeFrom(message)
        if not message.last:
            return None
        layer = LayerGraph.from_message(self._pending, self.tokens, self._layers)
        self._pending = None
        self._layers.append(layer)
        return layer

    def _read_summary(self, message: trace_pb2.TraceSummary) -> TraceSummary:
        if self._pending is not None:
            raise self.violation(f"expected the rest of layer {self._pending.layer}; got the end")
        self._summary = TraceSummary.from_message(message)
        return self._summary

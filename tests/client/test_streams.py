"""Test the assembly of streams, message by message."""

from __future__ import annotations

import json

import pytest

from januslens import (
    Gradient,
    LayerGraph,
    Matrix,
    ProtocolViolation,
    StreamInterrupted,
    Trace,
    read_gradient,
    read_trace,
)
from januslens.assemblers import GradientAssembler, TraceAssembler
from januslens.v1 import trace_pb2
from tests.client import messages
from tests.client.messages import gradient_stream, trace_stream


def assembled_trace(responses: list[trace_pb2.TraceResponse]) -> Trace:
    assembler = TraceAssembler()
    for response in responses:
        assembler.feed(response)
    return assembler.result()


def test_events_are_returned_when_complete() -> None:
    assembler = TraceAssembler()
    events = [assembler.feed(response) for response in trace_stream()]
    assert [type(event).__name__ for event in events] == [
        "TraceHeader",
        "LayerGraph",
        "TraceSummary",
    ]
    assert assembler.result().header.request_id == "r1"
    assert assembler.result().layers == (events[1],)
    assert assembler.result().summary == events[2]


def test_layer_in_several_messages_equals_the_layer_in_one() -> None:
    first = trace_pb2.LayerGraph(layer=0, nodes=messages.NODES[:4], tokens=messages.tokens(2, 3))
    second = trace_pb2.LayerGraph(
        layer=0,
        nodes=messages.NODES[4:],
        edges=messages.EDGES,
        tokens=messages.tokens(4),
        last=True,
    )
    pieces = trace_stream(messages.trace_header(), first, second, messages.trace_summary())
    assembler = TraceAssembler()
    events = [assembler.feed(response) for response in pieces]
    assert events[1] is None
    assert isinstance(events[2], LayerGraph)
    assert assembler.result() == assembled_trace(trace_stream())


def test_matrix_in_several_messages_equals_the_matrix_in_one() -> None:
    pieces = gradient_stream(
        messages.gradient_header(),
        messages.matrix([1], last=False),
        messages.matrix([0]),
        messages.gradient_summary(),
    )
    assembler = GradientAssembler()
    events = [assembler.feed(response) for response in pieces]
    assert events[1] is None
    assert isinstance(events[2], Matrix)
    assert [component.position for component in events[2].components] == [1, 0]
    assert events[2].frobenius_norm == pytest.approx(104**0.5)


def test_token_texts_sent_once_are_kept() -> None:
    trace = assembled_trace(trace_stream())
    prediction = trace.node("p1/PREDICTION").projection
    assert prediction is not None
    assert [score.token.text for score in prediction.top] == [" c", " d"]
    assert prediction.top[0].token.raw == b" c"


def test_a_target_is_named_though_its_text_came_after_the_header() -> None:
    assembler = TraceAssembler()
    header = assembler.feed(trace_stream()[0])
    assert str(header.targets[0].target) == "#2"  # type: ignore[union-attr]  # it is a header
    for response in trace_stream()[1:]:
        assembler.feed(response)
    assert assembler.result().targets[0].target.text == " c"


def test_stream_without_summary_raises_with_the_received_part() -> None:
    with pytest.raises(StreamInterrupted, match="after 2 messages") as caught:
        assembled_trace(trace_stream()[:2])
    partial = caught.value.partial
    assert isinstance(partial, Trace)
    assert len(partial.layers) == 1
    assert partial.summary is None
    assert caught.value.request_id == "r1"
    assert caught.value.reason == "STREAM_INTERRUPTED"


def test_half_a_layer_is_not_in_the_partial_result() -> None:
    assembler = TraceAssembler()
    for response in trace_stream(messages.trace_header(), messages.layer(last=False)):
        assembler.feed(response)
    partial = assembler.partial()
    assert partial is not None
    assert partial.layers == ()


def test_an_empty_stream_is_interrupted_without_partial() -> None:
    with pytest.raises(StreamInterrupted) as caught:
        assembled_trace([])
    assert caught.value.partial is None


def test_a_missing_message_is_a_violation() -> None:
    header, _, summary = trace_stream()
    with pytest.raises(ProtocolViolation, match="unexpected message 2 of the stream; expected 1"):
        assembled_trace([header, summary])


def test_a_repeated_message_is_a_violation() -> None:
    header = trace_stream()[0]
    with pytest.raises(ProtocolViolation, match="unexpected message 0 of the stream; expected 1"):
        assembled_trace([header, header])


def test_interleaved_layers_are_a_violation() -> None:
    other = trace_pb2.LayerGraph(layer=1, last=True)
    stream = trace_stream(messages.trace_header(), messages.layer(last=False), other)
    with pytest.raises(ProtocolViolation, match="layer 1 began before the end of layer 0"):
        assembled_trace(stream)


def test_a_summary_in_the_middle_of_a_matrix_is_a_violation() -> None:
    assembler = GradientAssembler()
    stream = gradient_stream(
        messages.gradient_header(), messages.matrix(last=False), messages.gradient_summary()
    )
    assembler.feed(stream[0])
    assembler.feed(stream[1])
    with pytest.raises(ProtocolViolation, match=r"the stream ended before the end of L1\.FF2"):
        assembler.feed(stream[2])


def test_a_summary_without_a_header_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="a summary but no header"):
        assembled_trace(trace_stream(messages.trace_summary()))


def test_unknown_event_of_a_newer_server_is_ignored() -> None:
    header, layer, summary = messages.trace_header(), messages.layer(), messages.trace_summary()
    stream = trace_stream(header, layer, layer, summary)
    stream[2].ClearField("layer")
    assert len(assembled_trace(stream).layers) == 1


def test_gradient_is_assembled_from_its_messages() -> None:
    assembler = GradientAssembler()
    for response in gradient_stream():
        assembler.feed(response)
    gradient = assembler.result()
    assert isinstance(gradient, Gradient)
    assert [matrix.name for matrix in gradient.matrices] == ["L1.FF2", "L1.FF1"]
    assert gradient.loss == 1.25
    assert [token.text for token in gradient.header.targets] == [" c"]
    assert gradient.header.predicted.text == " d"


def test_recordings_with_fields_of_another_version_are_read() -> None:
    def with_other_fields(line: str) -> str:
        message = json.loads(line)
        message["addedLater"] = {"batchSize": 4}
        if "summary" in message:
            message["summary"]["batchSize"] = 4
        return json.dumps(message)

    trace = assembled_trace(trace_stream())
    assert read_trace(map(with_other_fields, trace.to_json_lines())) == trace
    assembler = GradientAssembler()
    for response in gradient_stream():
        assembler.feed(response)
    gradient = assembler.result()
    assert read_gradient(map(with_other_fields, gradient.to_json_lines())) == gradient

"""Rules of every stream: sequence numbers, sizes, order, texts sent once, and equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import grpc
import pytest

from januslens.v1 import gradient_lens_pb2, lens_pb2, models_pb2, service_pb2_grpc, trace_pb2
from januslens.v1.common_pb2 import Target, TokenIds
from tests.support.calls import prompt, timeless, token_ids

Stub = service_pb2_grpc.IntrospectionServiceStub

PROMPT = "The capital of Japan is the city of"
MESSAGE_LIMIT = 2**20

TRACES: dict[str, trace_pb2.TraceRequest] = {
    "default": trace_pb2.TraceRequest(input=prompt(PROMPT)),
    "some layers": trace_pb2.TraceRequest(input=prompt(PROMPT), layers=[3, 0, 0]),
    "everything": trace_pb2.TraceRequest(
        input=token_ids(300, 301),
        all_positions=True,
        include_vectors=True,
        include_logit_contribution=True,
        overlap_k=10,
        selection=trace_pb2.Selection(heads=0, memory_values_per_head=0, top_neurons=0),
    ),
    "long lists": trace_pb2.TraceRequest(
        input=prompt(PROMPT), top_k=900, bottom_k=900, all_positions=True, layers=[0]
    ),
    "no lists": trace_pb2.TraceRequest(
        input=prompt(PROMPT), top_k=0, bottom_k=0, target=Target(text=" Paris")
    ),
    "residual only": trace_pb2.TraceRequest(
        input=prompt(PROMPT), node_kinds=[trace_pb2.NODE_KIND_BLOCK_OUTPUT]
    ),
    "a kind that GPT-2 has not": trace_pb2.TraceRequest(
        input=prompt(PROMPT), node_kinds=[trace_pb2.NODE_KIND_MLP_UP]
    ),
}

NLL = gradient_lens_pb2.NegativeLogLikelihood(target=Target(text=" Paris"))
GRADIENTS: dict[str, gradient_lens_pb2.GradientLensRequest] = {
    "default": gradient_lens_pb2.GradientLensRequest(input=prompt(PROMPT), nll=NLL),
    "everything": gradient_lens_pb2.GradientLensRequest(
        input=token_ids(*range(300, 340)),
        nll=NLL,
        matrices=gradient_lens_pb2.MatrixKind.values()[1:-1],  # without MODULE
        components=0,
        top_k=50,
        bottom_k=50,
        spectrum_rank=40,
        neurons=512,
        learning_rate=0.1,
        include_factors=True,
        verify=True,
    ),
    "divergence": gradient_lens_pb2.GradientLensRequest(
        input=prompt(PROMPT),
        kl=gradient_lens_pb2.KlDivergence(suppressed=TokenIds(ids=[300, 301])),
        layers=[1, 3],
    ),
}


REQUESTS: dict[str, dict[str, Any]] = {"Trace": TRACES, "GradientLens": GRADIENTS}
STREAMS = [(method, name) for method, requests in REQUESTS.items() for name in requests]

Streamed = Callable[[str, str], list[Any]]


@pytest.fixture(scope="module")
def streamed(stub: Stub) -> Streamed:
    """The whole stream of one of the requests above, requested once."""

    @cache
    def messages(method: str, name: str) -> list[Any]:
        return list(getattr(stub, method)(REQUESTS[method][name]))

    return messages


@pytest.fixture(params=STREAMS, ids=lambda stream: f"{stream[0]}: {stream[1]}")
def stream(request: pytest.FixtureRequest, streamed: Streamed) -> list[Any]:
    return streamed(*request.param)


@pytest.fixture(params=TRACES)
def trace(request: pytest.FixtureRequest, streamed: Streamed) -> list[trace_pb2.TraceResponse]:
    return streamed("Trace", request.param)


@pytest.fixture(params=GRADIENTS)
def gradient(
    request: pytest.FixtureRequest, streamed: Streamed
) -> list[gradient_lens_pb2.GradientLensResponse]:
    return streamed("GradientLens", request.param)


def test_messages_are_numbered_from_zero(stream: list[Any]) -> None:
    assert [message.sequence for message in stream] == list(range(len(stream)))


def test_messages_fit_grpcs_default_limit(stream: list[Any]) -> None:
    assert max(message.ByteSize() for message in stream) <= MESSAGE_LIMIT


def test_header_comes_first_and_summary_last_and_once(stream: list[Any]) -> None:
    first, *middle, last = [message.WhichOneof("event") for message in stream]
    assert (first, last) == ("header", "summary")
    assert len(set(middle)) == 1
    assert set(middle) <= {"layer", "matrix"}


def test_header_sizes_equal_those_of_list_models(stream: list[Any], demo: models_pb2.Model) -> None:
    for size in stream[0].header.sizes.DESCRIPTOR.fields:
        assert getattr(stream[0].header.sizes, size.name) == getattr(demo, size.name) > 0


def test_token_text_is_sent_once_no_later_than_its_first_use(stream: list[Any]) -> None:
    """The prompt's own tokens contain their texts."""
    known: set[int] = {token.id for token in stream[0].header.prompt_tokens}
    for message in stream[:-1]:
        event = getattr(message, message.WhichOneof("event"))
        brought = [token.id for token in event.tokens]
        assert len(set(brought)) == len(brought)
        assert known.isdisjoint(brought)
        known.update(brought)
        assert known >= set(named_by(event))


def named_by(event: Any) -> Iterator[int]:
    if isinstance(event, trace_pb2.TraceHeader):
        for target in event.targets:
            yield from (target.target_token_id, target.predicted_token_id)
    elif isinstance(event, gradient_lens_pb2.GradientHeader):
        yield from (*event.target_token_ids, event.predicted_token_id)
    else:
        for projection in projections_of(event):
            yield from (*projection.top_token_ids, *projection.bottom_token_ids)


def projections_of(piece: Any) -> Iterator[lens_pb2.Projection]:
    if isinstance(piece, trace_pb2.LayerGraph):
        yield from (node.projection for node in piece.nodes)
        return
    yield from (component.projection for component in piece.components)
    yield from (singular.projection for singular in piece.spectrum)
    for change in piece.neurons:
        yield from (change.before, change.change, change.after)


def test_a_layer_ends_once_with_its_last_message(trace: list[trace_pb2.TraceResponse]) -> None:
    layers = [message.layer for message in trace[1:-1]]
    assert_ends_once([layer.layer for layer in layers], [layer.last for layer in layers])
    assert sorted({layer.layer for layer in layers}) == list(trace[0].header.layers)


def test_a_matrix_ends_once_with_its_last_message(
    gradient: list[gradient_lens_pb2.GradientLensResponse],
) -> None:
    matrices = [message.matrix for message in gradient[1:-1]]
    groups = [(-matrix.layer, matrix.kind) for matrix in matrices]
    assert_ends_once(groups, [matrix.last for matrix in matrices])
    assert gradient[-1].summary.matrices == len(set(groups))
    verified = [matrix.last for matrix in matrices if matrix.HasField("verification")]
    assert all(verified)


def assert_ends_once(groups: Sequence[Any], lasts: Sequence[bool]) -> None:
    """Check that groups are contiguous, ascend by their first part, and end with `last`."""
    for group, following, last in zip(groups, [*groups[1:], None], lasts, strict=True):
        assert last == (group != following)
    closed = [group for group, last in zip(groups, lasts, strict=True) if last]
    assert len(set(closed)) == len(closed)
    layers = [group[0] if isinstance(group, tuple) else group for group in closed]
    assert layers == sorted(layers)


def test_an_edge_joins_nodes_sent_before_or_with_it(trace: list[trace_pb2.TraceResponse]) -> None:
    sent: set[str] = set()
    for message in trace[1:-1]:
        brought = [node.id for node in message.layer.nodes]
        assert len(set(brought)) == len(brought)
        assert sent.isdisjoint(brought)
        sent.update(brought)
        for edge in message.layer.edges:
            assert {edge.source, edge.target} <= sent


def test_the_summary_counts_what_was_sent(trace: list[trace_pb2.TraceResponse]) -> None:
    layers = [message.layer for message in trace[1:-1]]
    summary = trace[-1].summary
    assert summary.nodes == sum(len(layer.nodes) for layer in layers)
    assert summary.edges == sum(len(layer.edges) for layer in layers)
    assert {time.stage for time in summary.times} >= {"forward", "project"}


def test_a_large_layer_and_a_large_matrix_span_several_messages(streamed: Streamed) -> None:
    """Otherwise the tests above would not cover several messages."""
    layers = [message.layer.layer for message in streamed("Trace", "everything")[1:-1]]
    assert layers.count(1) > 3
    matrices = [message.matrix for message in streamed("GradientLens", "everything")[1:-1]]
    kinds = [(matrix.layer, matrix.kind) for matrix in matrices]
    assert kinds.count((1, gradient_lens_pb2.MATRIX_KIND_FF2)) > 1


@pytest.mark.parametrize(("method", "name"), STREAMS)
def test_the_same_request_gives_the_same_bytes(
    stub: Stub, streamed: Streamed, method: str, name: str
) -> None:
    again = getattr(stub, method)(REQUESTS[method][name])
    assert [timeless(message) for message in again] == [
        timeless(message) for message in streamed(method, name)
    ]


def test_defaults_are_the_contracts(streamed: Streamed, demo: models_pb2.Model) -> None:
    messages: list[trace_pb2.TraceResponse] = streamed("Trace", "default")
    header = messages[0].header
    assert list(header.layers) == list(range(demo.n_layers))
    length = len(header.prompt_tokens)
    assert [target.position for target in header.targets] == [length - 1]
    (target,) = header.targets
    assert target.target_token_id == target.predicted_token_id
    for message in messages[1:-1]:
        for node in message.layer.nodes:
            listed = 5 if node.HasField("projection") else 0
            assert len(node.projection.top_token_ids) == listed
            assert len(node.projection.bottom_token_ids) == listed


def test_negative_positions_count_from_the_end(stub: Stub) -> None:
    request = trace_pb2.TraceRequest(
        input=token_ids(300, 301, 302), positions=[-1, 0, -3], layers=[0]
    )
    header = next(iter(stub.Trace(request))).header
    assert [target.position for target in header.targets] == [0, 2]


def test_layers_that_are_not_adjacent_are_joined_by_gap_edges(streamed: Streamed) -> None:
    messages: list[trace_pb2.TraceResponse] = streamed("Trace", "some layers")
    gaps = [
        (edge.source, edge.target)
        for message in messages
        for edge in message.layer.edges
        if edge.kind == trace_pb2.EDGE_KIND_GAP
    ]
    last = len(messages[0].header.prompt_tokens) - 1
    assert gaps == [(f"L0/p{last}/BLOCK_OUTPUT", f"L2/p{last}/BLOCK_OUTPUT")]


def test_node_has_the_same_id_and_projection_in_any_request(stub: Stub, streamed: Streamed) -> None:
    def residuals(messages: Iterable[trace_pb2.TraceResponse]) -> dict[str, bytes]:
        return {
            node.id: node.SerializeToString(deterministic=True)
            for message in messages
            for node in message.layer.nodes
            if node.kind == trace_pb2.NODE_KIND_BLOCK_OUTPUT
        }

    alone = residuals(stub.Trace(trace_pb2.TraceRequest(input=prompt(PROMPT), layers=[2])))
    among = residuals(streamed("Trace", "default"))
    assert alone.keys() <= among.keys()
    assert all(alone[node] == among[node] for node in alone)


def test_equal_messages_serialise_to_equal_bytes(channel: grpc.Channel, streamed: Streamed) -> None:
    """This includes maps, whose entries protobuf sends in an order that differs by process."""
    call: Any = channel.unary_stream(
        "/januslens.v1.IntrospectionService/Trace",
        request_serializer=trace_pb2.TraceRequest.SerializeToString,
    )
    received: list[bytes] = list(call(TRACES["some layers"]))
    assert len(received) == len(streamed("Trace", "some layers"))
    for sent in received:
        message = trace_pb2.TraceResponse.FromString(sent)
        assert message.SerializeToString(deterministic=True) == sent

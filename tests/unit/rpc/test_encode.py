"""Encode records as messages: split by size, with token texts, nodes before edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from januslens.v1 import common_pb2, trace_pb2
from januslens_server.results import (
    EdgeKind,
    Edges,
    Gradients,
    LayerGraph,
    Node,
    NodeColumn,
    NodeKind,
    NodeRun,
    Nodes,
    ProjectionTable,
    SiteValues,
    Token,
    coordinates,
)
from januslens_server.rpc.encode import ActivationsEncoder, TraceEncoder
from januslens_server.rpc.encode.columns import Columns, Parts
from januslens_server.rpc.encode.messages import (
    FRAME_BYTES,
    PIECE_BYTES,
    Pieces,
    Reading,
    ReadToken,
    TokenTexts,
    token_message,
)

D_MODEL = 64


def token(token_id: int) -> Token:
    return Token(token_id, f"<{token_id}>", f"<{token_id}>".encode())


Named = tuple[str, list[int]]


def cut(
    nodes: Sequence[Named], limit: int, read_token: ReadToken = token
) -> list[trace_pb2.LayerGraph]:
    """Return nodes by name, each with its tokens, in as many bodies as needed."""
    pieces = Pieces(trace_pb2.LayerGraph(), TokenTexts(read_token), limit)
    columns = Columns(trace_pb2.Node, len(nodes))
    columns.texts("id", [name for name, _ in nodes])
    ids = np.array([listed for _, listed in nodes], np.int64).reshape(
        len(nodes), -1 if nodes else 0
    )
    nothing = np.zeros(ids.shape, np.float32)
    listing = replace(table(len(nodes)), top_ids=ids, top_logits=nothing, top_probabilities=nothing)
    reading = Reading.of(replace(listing, bottom_ids=ids[:, :0]))
    reading.add_to(columns, "projection")
    pieces.extend(Parts(trace_pb2.LayerGraph, "nodes", columns), [reading])
    bodies = pieces.messages(trace_pb2.LayerGraph())
    return [trace_pb2.LayerGraph.FromString(body) for body in bodies]


def present(message: Any) -> set[str]:
    """Return the fields that are set."""
    return {field.name for field, _ in message.ListFields()}


def test_empty_list_is_one_empty_message() -> None:
    """A layer without visible nodes still ends with a message."""
    assert cut([], 100) == [trace_pb2.LayerGraph()]


@pytest.mark.parametrize("limit", [1, 30, 100, 1000, 10**6])
def test_pieces_keep_the_order_and_end_at_the_limit(limit: int) -> None:
    """A piece is closed by the part that reaches the limit."""
    nodes = [("n" * (i % 17), [i, i + 1, i // 2]) for i in range(100)]
    bodies = cut(nodes, limit)
    assert [node.id for body in bodies for node in body.nodes] == [name for name, _ in nodes]
    largest = (
        max(body.nodes[-1].ByteSize() for body in bodies) + 3 * token_message(token(99)).ByteSize()
    )
    for body in bodies:
        assert body.nodes
        assert body.ByteSize() <= limit + largest + 4 * FRAME_BYTES
    for body in bodies[:-1]:
        parts = len(body.nodes) + len(body.tokens)
        assert body.ByteSize() + FRAME_BYTES * parts >= limit
    assert limit < 10**6 or len(bodies) == 1


def test_text_is_sent_in_the_message_that_first_uses_it() -> None:
    known: set[int] = set()
    for body in cut([("n", [i, i + 1, i]) for i in range(50)], 60):
        brought = [message.id for message in body.tokens]
        assert len(set(brought)) == len(brought)
        assert known.isdisjoint(brought)
        known.update(brought)
        assert known >= {i for node in body.nodes for i in node.projection.top_token_ids}
    assert known == set(range(51))


def test_texts_count_towards_the_limit() -> None:
    """Small nodes may list long tokens."""

    def long_token(token_id: int) -> Token:
        return Token(token_id, "x" * 1000, b"x" * 1000)

    bodies = cut([("", [i]) for i in range(20)], 5000, long_token)
    assert [len(body.nodes) for body in bodies] == [3] * 6 + [2]


def test_texts_of_the_prompt_are_not_sent_again() -> None:
    texts = TokenTexts(token)
    assert [message.id for message in texts.of_prompt([token(3), token(3)])] == [3, 3]
    assert [message.id for message in texts.texts([5, 3, 4, 5])] == [5, 4]
    assert texts.texts([3, 4, 5]) == []


def table(n: int, projected: bool = True) -> ProjectionTable:
    ids = np.arange(2 * n).reshape(n, 2)
    values = np.linspace(0, 1, 2 * n, dtype=np.float32).reshape(n, 2)
    one = np.ones((n, 1), dtype=np.float32)
    return ProjectionTable(
        projected=np.full(n, projected),
        top_ids=ids,
        top_logits=values,
        top_probabilities=values,
        bottom_ids=ids[:, :1],
        bottom_logits=one,
        bottom_probabilities=one,
        entropy_bits=one[:, 0],
        log_normalizers=one[:, 0],
        target_ids=ids[:, :1],
        target_ranks=ids[:, :1],
        target_logits=one,
        target_probabilities=one,
    )


def layer(n: int, *, last: bool = True) -> LayerGraph:
    """Return n MLP neurons, each with an edge from the one before."""
    run = NodeRun(NodeKind.MLP_VALUE, 7, 3, neurons=range(n))
    absent = np.full(n - 1, np.nan, np.float32)
    return LayerGraph(
        layer=3,
        nodes=Nodes(run.ids, coordinates([run])),
        norms=np.arange(n, dtype=np.float32),
        activations=np.where(np.arange(n) % 2, np.nan, 1.5).astype(np.float32),
        rows=np.arange(n) - 1,
        projections=table(n - 1),
        edges=Edges(
            sources=run.ids[1:],
            targets=run.ids[:-1],
            kinds=np.full(n - 1, EdgeKind.PART, np.int64),
            weights=np.full(n - 1, 2.0, np.float32),
            shares=np.where(np.arange(n - 1) == 0, 0.5, np.nan).astype(np.float32),
            attention=absent,
            logit_contributions=absent,
            attributions=absent,
            overlaps=absent.astype(np.float64),
        ),
        last=last,
        vectors=np.ones((n, D_MODEL), dtype=np.float32),
    )


def gradients(n: int) -> Gradients:
    return Gradients(np.ones(n, np.float32), np.arange(n) - 1, table(n - 1))


def encoded(graph: LayerGraph) -> Iterator[trace_pb2.TraceResponse]:
    return map(trace_pb2.TraceResponse.FromString, TraceEncoder("id-1", token).encode(graph))


def test_a_large_layer_is_cut_with_its_end_in_the_last_message() -> None:
    graph = layer(6000)
    messages = list(encoded(graph))
    assert len(messages) > 3
    assert max(message.ByteSize() for message in messages) < PIECE_BYTES + 1024
    assert [message.sequence for message in messages] == list(range(len(messages)))
    assert [message.layer.last for message in messages] == [False] * (len(messages) - 1) + [True]
    assert sum(len(message.layer.nodes) for message in messages) == 6000
    assert sum(len(message.layer.edges) for message in messages) == 5999
    sent: set[str] = set()
    for message in messages:
        sent.update(node.id for node in message.layer.nodes)
        assert all({edge.source, edge.target} <= sent for edge in message.layer.edges)


@pytest.mark.parametrize("nodes", [3, 6000])
def test_bytes_are_those_of_protocol_buffers(nodes: int) -> None:
    """Fields are in the order of their numbers, and zeros of fields without presence are absent."""
    graph = replace(layer(nodes), gradients=gradients(nodes))
    graph.nodes.coordinates[:, NodeColumn.MEMBERS :] = (2, 2**60)
    for message in TraceEncoder("id-1", token).encode(graph):
        parsed = trace_pb2.TraceResponse.FromString(message)
        assert parsed.SerializeToString(deterministic=True) == message
        assert parsed.layer.nodes or parsed.layer.edges


def test_a_cached_text_is_that_of_its_own_vocabulary() -> None:
    def other(token_id: int) -> Token:
        return Token(token_id, "other", b"other")

    for read_token in (token, other, token):
        (body,) = cut([("n", [1, 300])], 10**6, read_token)
        assert list(body.tokens) == [token_message(read_token(i)) for i in (1, 300)]


def test_texts_beyond_the_cache_are_encoded_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("januslens_server.rpc.encode.messages.ENTRIES", 1)

    def own(token_id: int) -> Token:
        return token(token_id)

    for _ in range(2):
        (body,) = cut([("n", [1, 2, 3])], 10**6, own)
        assert list(body.tokens) == [token_message(token(i)) for i in (1, 2, 3)]


def test_unfinished_layer_has_no_last_message() -> None:
    assert not any(message.layer.last for message in encoded(layer(3, last=False)))


def test_only_applicable_fields_of_a_node_are_set() -> None:
    (message,) = encoded(layer(3))
    first, second, third = message.layer.nodes
    assert first.id == "L3/p7/MLP_VALUE/n0"
    assert (first.layer, first.position, first.neuron) == (3, 7, 0)
    coordinates = {"id", "kind", "layer", "position", "neuron"}
    assert present(first) == coordinates | {"activation", "vector"}  # norm 0, no row of the table
    assert present(second) == coordinates | {"norm", "projection", "vector"}
    assert list(second.projection.top_token_ids) == [0, 1]
    assert list(third.projection.bottom_token_ids) == [2]
    assert list(first.vector.shape) == [D_MODEL]
    assert len(first.vector.data) == 4 * D_MODEL
    weighted, other = message.layer.edges
    assert (weighted.share, weighted.weight) == (0.5, 2.0)
    assert present(weighted) == {"source", "target", "kind", "weight", "share"}
    assert present(other) == {"source", "target", "kind", "weight"}


def test_a_node_id_is_its_coordinates() -> None:
    ids = {
        Node(NodeKind.BLOCK_INPUT, 7).id: "p7/BLOCK_INPUT",
        Node(NodeKind.BLOCK_OUTPUT, 7, 3).id: "L3/p7/BLOCK_OUTPUT",
        Node(NodeKind.HEAD_OUTPUT, 7, 3, head=2).id: "L3/p7/HEAD_OUTPUT/h2",
        Node(NodeKind.MEMORY_VALUE, 7, 3, head=2, source_position=4).id: (
            "L3/p7/MEMORY_VALUE/h2/s4"
        ),
        Node(NodeKind.MLP_VALUE, 7, 3, neuron=911).id: "L3/p7/MLP_VALUE/n911",
        Node(NodeKind.MLP_VALUE, 7, 3, neuron=911, expert=2).id: "L3/p7/MLP_VALUE/e2/n911",
    }
    assert all(made == expected for made, expected in ids.items())


@pytest.mark.parametrize(
    ("name", "code", "item"),
    [("float32", common_pb2.DATA_TYPE_FLOAT32, 4), ("bfloat16", common_pb2.DATA_TYPE_BFLOAT16, 2)],
)
def test_large_site_values_span_messages_of_at_most_1_mib(name: str, code: int, item: int) -> None:
    data = np.arange(3 * 2**20, dtype=np.int64).astype(np.uint8)
    event = SiteValues(14, 2, (5, len(data) // item), 8, name, data)
    messages = list(ActivationsEncoder("id").encode(event))
    assert max(message.ByteSize() for message in messages) <= 2**20
    assert b"".join(message.tensor.piece.data for message in messages) == data.tobytes()
    offset = 8
    for message in messages:
        assert message.tensor.offset == offset
        assert message.tensor.piece.data_type == code
        (count,) = message.tensor.piece.shape
        assert count * item == len(message.tensor.piece.data)
        offset += count

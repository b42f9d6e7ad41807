"""Test the queries of a trace against results computed by hand (see messages.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from januslens import ContributionTree, LayerGraph, NodeKind, Token, TokenScore, Trace, read_trace
from januslens.assemblers import TraceAssembler
from januslens.v1 import trace_pb2
from tests.client import messages
from tests.client import presentation_fixtures as fixtures
from tests.client.messages import trace_stream


@pytest.fixture
def trace() -> Trace:
    assembler = TraceAssembler()
    for response in trace_stream():
        assembler.feed(response)
    return assembler.result()


@pytest.fixture
def layer(trace: Trace) -> LayerGraph:
    return trace.layer(0)


def test_node_has_its_coordinates_and_projection(trace: Trace) -> None:
    node = trace.node("L0/p1/MEMORY_VALUE/h0/s0")
    assert node.kind is NodeKind.MEMORY_VALUE
    assert (node.layer, node.position, node.head, node.source_position) == (0, 1, 0, 0)
    assert node.neuron is None
    assert node.activation is None
    assert node.projection is not None
    assert node.projection.top[0].token.text == " c"
    assert node.projection.top[0].probability == 0.5
    assert node.projection.top[0].logit == 4.0
    assert node.projection.target_rank == 0


def test_a_zero_that_was_sent_is_not_an_absent_value(trace: Trace) -> None:
    assert trace.node("L0/p1/HEAD_OUTPUT/h0").head == 0
    assert trace.node("L0/p1/MLP_OUTPUT").head is None
    assert trace.node("p1/BLOCK_INPUT").layer is None


def test_a_junction_has_no_projection(trace: Trace) -> None:
    assert trace.node("L0/p1/ATTENTION_CONCAT").projection is None


def test_nodes_of_a_kind_at_a_position(trace: Trace) -> None:
    assert [node.head for node in trace.nodes_of("head_output")] == [0, 1]
    assert trace.nodes_of(NodeKind.HEAD_OUTPUT, position=0) == []
    with pytest.raises(ValueError, match="unknown value"):
        trace.nodes_of("heads")


def test_parts_are_ordered_by_magnitude(trace: Trace) -> None:
    parts = trace.parts_of("L0/p1/MLP_OUTPUT")
    assert [part.node.id.rpartition("/")[2] for part in parts] == ["n7", "MLP_OUTPUT", "n8"]
    assert [part.share for part in parts] == [1.125, -0.25, 0.125]
    assert sum(part.share or 0 for part in parts) == 1.0
    assert trace.parts_of(trace.node("p1/PREDICTION")) == []  # no sum


def test_a_layers_sum_reaches_back_to_its_input(layer: LayerGraph) -> None:
    ids = [part.node.id for part in layer.parts_of("L0/p1/RESIDUAL_MID")]
    assert ids == ["L0/p1/ATTENTION_OUTPUT", "p1/BLOCK_INPUT"]


def test_heads_and_neurons_of_a_layer(layer: LayerGraph) -> None:
    assert [(part.node.head, part.share) for part in layer.heads()] == [(0, 0.75), (1, 0.25)]
    assert [(part.node.neuron, part.weight) for part in layer.neurons(1)] == [(7, 3.0), (8, 1.0)]
    assert layer.neurons(position=0) == []


def test_parts_whose_sum_is_hidden_name_the_kinds_to_request() -> None:
    hidden = messages.layer()
    del hidden.edges[:]
    assembler = TraceAssembler()
    for response in trace_stream(messages.trace_header(), hidden, messages.trace_summary()):
        assembler.feed(response)
    trace = assembler.result()
    for found in (trace, trace.layers[0]):
        with pytest.raises(ValueError, match="request HEAD_OUTPUT with ATTENTION_CONCAT, or"):
            found.heads()
        with pytest.raises(ValueError, match="request MLP_VALUE with MLP_OUTPUT and MLP_SUM, or"):
            found.neurons()
    parts = trace.parts_of_kind("HEAD_OUTPUT")
    assert [(part.node.head, part.edge, part.share) for part in parts] == [
        (0, None, None),
        (1, None, None),
    ]
    assert "Heads at position 1" in trace.layers[0]._repr_html_()


def test_contributions_are_every_summand_once_and_add_up_to_the_logit(trace: Trace) -> None:
    parts = trace.contributions()
    assert [(part.node.id.split("/", 1)[1], part.logit_contribution) for part in parts] == [
        ("p1/MLP_VALUE/n7", 2.0),
        ("p1/HEAD_OUTPUT/h0", 1.5),
        ("BLOCK_INPUT", 0.5),
        ("p1/MLP_VALUE/n8", 0.25),
        ("p1/HEAD_OUTPUT/h1", -0.25),
        ("p1/OTHER/MLP_OUTPUT", -0.5),
    ]
    target = trace.target()
    total = sum(part.logit_contribution or 0 for part in parts)
    assert total + target.constant_logit_contribution == target.target_logit == 4.0


@pytest.mark.parametrize("limited", [False, True])
def test_contributions_divide_a_mixer_with_known_heads(limited: bool) -> None:
    """Without known heads, the mixer is one part, also beside attention (`limited` is False)."""
    sublayers = {"MLP_OUTPUT": 1.75} if limited else {}
    heads = {"MIXER_HEAD/h0": 1.5, "MIXER_HEAD/h1": -0.25}
    layers = {True: fixtures.with_mixer_heads(), False: fixtures.with_mixer()}
    for divided, layer in layers.items():
        stream = fixtures.stream_of(layer)
        stream[0].header.limited_layers.extend(fixtures.sublayers(0) if limited else [])
        assembler = TraceAssembler()
        for response in stream:
            assembler.feed(response)
        parts = assembler.result().contributions()
        found = {part.node.id.split("p1/", 1)[1]: part.logit_contribution for part in parts}
        mixer = heads if divided else {"MIXER_OUTPUT": 1.25}
        assert found == {"BLOCK_INPUT": 0.5, **mixer, **sublayers}


def test_unrequested_contributions_raise_a_clear_error() -> None:
    bare = messages.layer()
    for edge in bare.edges:
        edge.ClearField("logit_contribution")
    assembler = TraceAssembler()
    for response in trace_stream(messages.trace_header(), bare, messages.trace_summary()):
        assembler.feed(response)
    with pytest.raises(ValueError, match="logit_contribution=True"):
        assembler.result().contributions()


def test_contributions_of_parts_without_their_sums_name_the_kinds_to_request() -> None:
    hidden = messages.layer()
    del hidden.edges[:]
    assembler = TraceAssembler()
    for response in trace_stream(messages.trace_header(), hidden, messages.trace_summary()):
        assembler.feed(response)
    with pytest.raises(ValueError, match="HEAD_OUTPUT with ATTENTION_CONCAT"):
        assembler.result().contributions()


def test_negative_positions_count_from_the_end_of_the_prompt(
    trace: Trace, layer: LayerGraph
) -> None:
    last = len(trace.prompt_tokens) - 1
    assert trace.target(-1) == trace.target(last)
    assert trace.nodes_of("MLP_VALUE", -1) == trace.nodes_of("MLP_VALUE", last) != []
    assert layer.neurons(-1) == layer.neurons(last) != []
    assert trace.contributions(-1) == trace.contributions(last)
    with pytest.raises(KeyError, match="position -9 was not traced"):
        trace.target(-9)


def _lines(tree: ContributionTree) -> list[tuple[int, str, float, float]]:
    return [(depth, part.node.id, part.contribution, part.rest) for depth, part in tree.lines()]


def test_contribution_tree_divides_the_logit_into_sublayers_heads_and_sources(trace: Trace) -> None:
    # The rest of the logit is the constant, that of the MLP is OTHER.
    assert _lines(trace.why()) == [
        (0, "L0/p1/BLOCK_OUTPUT", 4.0, 0.5),
        (1, "L0/p1/MLP_OUTPUT", 1.75, -0.5),
        (2, "L0/p1/MLP_VALUE/n7", 2.0, 2.0),
        (2, "L0/p1/MLP_VALUE/n8", 0.25, 0.25),
        (1, "L0/p1/ATTENTION_OUTPUT", 1.25, 0.0),
        (2, "L0/p1/HEAD_OUTPUT/h0", 1.5, 0.0),
        (3, "L0/p1/MEMORY_VALUE/h0/s0", 1.5, 1.5),
        (2, "L0/p1/HEAD_OUTPUT/h1", -0.25, -0.25),
        (1, "p1/BLOCK_INPUT", 0.5, 0.5),
    ]
    assert trace.why().find("L0/p1/MEMORY_VALUE/h0/s0").attention == 0.75


def test_contribution_tree_lists_the_largest_contributions_with_what_contains_them(
    trace: Trace,
) -> None:
    # Neuron 7 adds most, then the MLP that contains it; head 0 needs attention, so it is left out.
    assert _lines(trace.why(at_most=2)) == [
        (0, "L0/p1/BLOCK_OUTPUT", 4.0, 2.25),
        (1, "L0/p1/MLP_OUTPUT", 1.75, -0.25),
        (2, "L0/p1/MLP_VALUE/n7", 2.0, 2.0),
    ]
    assert _lines(trace.why(at_most=0)) == [(0, "L0/p1/BLOCK_OUTPUT", 4.0, 4.0)]


def test_contribution_tree_lists_large_heads_that_cancel() -> None:
    # Head 1 cancels head 0 but for 0.25, which hides both from a comparison of sublayers.
    cancelling = messages.layer()
    values = {
        ("L0/p1/HEAD_OUTPUT/h0", "L0/p1/ATTENTION_CONCAT"): 8.0,
        ("L0/p1/HEAD_OUTPUT/h1", "L0/p1/ATTENTION_CONCAT"): -7.75,
        ("L0/p1/ATTENTION_OUTPUT", "L0/p1/RESIDUAL_MID"): 0.25,
        ("L0/p1/RESIDUAL_MID", "L0/p1/BLOCK_OUTPUT"): 0.75,
    }
    for edge in cancelling.edges:
        if (edge.source, edge.target) in values:
            edge.logit_contribution = values[edge.source, edge.target]
    tree = _assembled(cancelling).why(at_most=3)
    assert _lines(tree) == [
        (0, "L0/p1/BLOCK_OUTPUT", 3.0, 2.75),
        (1, "L0/p1/ATTENTION_OUTPUT", 0.25, 0.0),
        (2, "L0/p1/HEAD_OUTPUT/h0", 8.0, 8.0),
        (2, "L0/p1/HEAD_OUTPUT/h1", -7.75, -7.75),
    ]


def test_contribution_tree_without_contributions_names_what_to_request() -> None:
    bare = messages.layer()
    for edge in bare.edges:
        edge.ClearField("logit_contribution")
    with pytest.raises(ValueError, match="logit_contribution=True"):
        _assembled(bare).why()


def _assembled(layer: trace_pb2.LayerGraph) -> Trace:
    assembler = TraceAssembler()
    for response in trace_stream(messages.trace_header(), layer, messages.trace_summary()):
        assembler.feed(response)
    return assembler.result()


def test_norm_effects_list_removed_and_added_tokens(trace: Trace) -> None:
    first, second, final = trace.norm_effects()
    assert (first.before.id, first.after.id) == ("p1/BLOCK_INPUT", "L0/p1/ATTENTION_INPUT")
    assert [token.text for token in first.removed] == ["a"]
    assert [token.text for token in first.kept] == [" b"]
    assert [token.text for token in first.added] == [" d"]
    assert first.overlap == 0.5
    assert [token.text for token in second.added] == ["\n"]
    assert (final.removed, final.added, final.overlap) == ((), (), 1.0)


def test_untraced_layer_raises_key_error_listing_the_traced_ones(trace: Trace) -> None:
    with pytest.raises(KeyError, match="layer 3 is not in the trace; expected one of 0"):
        trace.layer(3)
    with pytest.raises(KeyError, match="position 0 was not traced; expected one of 1"):
        trace.target(0)
    with pytest.raises(KeyError):
        trace.node("L9/p1/BLOCK_OUTPUT")


def test_the_frame_of_nodes(trace: Trace) -> None:
    frame = trace.nodes
    assert list(frame.index) == [node.id for node in messages.NODES]
    row = frame.loc["L0/p1/MLP_VALUE/n8"]
    assert (row["kind"], row["neuron"], row["activation"]) == ("MLP_VALUE", 8, -1.0)
    assert (row["top_token"], row["target_rank"]) == (" d", 2)
    assert frame["head"].isna().sum() == len(messages.NODES) - 3
    brought = frame[(frame["kind"] == "HEAD_OUTPUT") & (frame["target_rank"] == 0)]
    assert list(brought["head"]) == [0]


def test_the_frame_of_edges(trace: Trace) -> None:
    frame = trace.edges
    assert len(frame) == len(messages.EDGES)
    shares = frame[frame["kind"] == "PART"].groupby("target")["share"].sum()
    assert shares["L0/p1/BLOCK_OUTPUT"] == 1.0
    assert shares["L0/p1/MLP_OUTPUT"] == 1.0
    assert frame["attention"].count() == 1


def test_an_empty_layer_has_empty_frames() -> None:
    layer = LayerGraph(layer=0, node_list=(), edge_list=(), known_nodes={})
    assert layer.nodes.empty
    assert layer.edges.empty
    assert "target_rank" in layer.nodes.columns


def test_the_graph(trace: Trace) -> None:
    graph = trace.to_networkx()
    assert graph.number_of_nodes() == len(messages.NODES)
    assert graph.number_of_edges() == len(messages.EDGES)
    assert graph.nodes["L0/p1/HEAD_OUTPUT/h0"]["top_tokens"] == '[" c", " d"]'
    assert "head" not in graph.nodes["L0/p1/MLP_OUTPUT"]
    edge = graph.edges["L0/p1/MLP_OUTPUT", "L0/p1/BLOCK_OUTPUT", "PART"]
    assert edge["share"] == 0.5


# The characters at the ends of the first two planes, the controls, and half of a surrogate pair.
AWKWARD = "".join(map(chr, [*range(0x21), 0x7F, 0x85, 0xFFFE, 0xFFFF, 0x1F600])) + '<&>"\ud800'


def awkward_trace() -> Trace:
    """Return the trace with a token that XML forbids as the top token of every node."""
    assembler = TraceAssembler()
    for response in trace_stream():
        assembler.feed(response)
    trace = assembler.result()
    awkward = {score.token.id: Token(score.token.id, AWKWARD) for score in everywhere(trace)}
    for node in trace.node_list:
        if node.projection:
            scores = node.projection.top
            top = tuple(score._replace(token=awkward[score.token.id]) for score in scores)
            object.__setattr__(node.projection, "top", top)
    return trace


def everywhere(trace: Trace) -> list[TokenScore]:
    return [score for node in trace.node_list if node.projection for score in node.projection.top]


def written_as_json(graph: Any, path: Path) -> None:
    path.write_text(json.dumps(nx.node_link_data(graph, edges="edges")))


def read_from_json(path: Path) -> Any:
    return nx.node_link_graph(json.loads(path.read_text()), edges="edges")


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (nx.write_graphml_xml, nx.read_graphml),
        (nx.write_gexf, nx.read_gexf),
        (written_as_json, read_from_json),
    ],
)
def test_networkx_writes_the_graph_and_reads_it_back(write: Any, read: Any, tmp_path: Path) -> None:
    graph = awkward_trace().to_networkx()
    write(graph, tmp_path / "graph")
    back = read(tmp_path / "graph")
    assert set(back.nodes) == set(graph.nodes)
    assert back.number_of_edges() == graph.number_of_edges()
    for name, attributes in graph.nodes(data=True):
        assert {key: back.nodes[name][key] for key in attributes} == attributes
    shares = sorted(data["share"] for *_, data in graph.edges(data=True) if "share" in data)
    assert sorted(data["share"] for *_, data in back.edges(data=True) if "share" in data) == shares
    top = json.loads(back.nodes["L0/p1/HEAD_OUTPUT/h0"]["top_tokens"])
    assert "<U+0010>" in top[0]
    assert "<U+D800>" in top[0]
    assert "\U0001f600" in top[0]


def test_graph_of_one_layer_includes_its_input_node() -> None:
    assembler = TraceAssembler()
    second = messages.layer()
    second.layer = 1
    del second.nodes[:]
    del second.edges[:]
    second.nodes.add(id="L1/p1/RESIDUAL_MID", position=1, layer=1)
    second.edges.append(messages.edge("L0/p1/BLOCK_OUTPUT", "L1/p1/RESIDUAL_MID", "PART", 1.0))
    stream = trace_stream(
        messages.trace_header(), messages.layer(), second, messages.trace_summary()
    )
    for response in stream:
        assembler.feed(response)
    graph = assembler.result().layer(1).to_networkx()
    assert graph.nodes["L0/p1/BLOCK_OUTPUT"]["kind"] == "BLOCK_OUTPUT"


def test_the_stream_is_kept_as_json_and_read_back(trace: Trace) -> None:
    lines = list(trace.to_json_lines())
    assert len(lines) == 3
    assert [next(iter(set(json.loads(line)) - {"sequence"})) for line in lines] == [
        "header",
        "layer",
        "summary",
    ]
    assert all("\n" not in line for line in lines)
    assert read_trace(lines) == trace

"""Files of a trace's flow graph have its nodes and edges (see messages.py for the numbers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import networkx as nx
import pandas as pd
import pytest

import januslens
from januslens import Trace
from januslens.assemblers import TraceAssembler
from januslens.v1 import trace_pb2
from tests.client import messages
from tests.client.messages import trace_stream

SCHEMA = Path(__file__).parents[2] / "docs" / "circuit-graph.schema.json"


@pytest.fixture
def trace() -> Trace:
    assembler = TraceAssembler()
    for response in trace_stream():
        assembler.feed(response)
    return assembler.result()


def read_node_link(path: Path) -> Any:
    return nx.node_link_graph(json.loads(path.read_text()), edges="edges")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("graph.graphml", nx.read_graphml),
        ("graph.gexf", nx.read_gexf),
        ("graph.json", read_node_link),
    ],
)
def test_exported_graph_has_the_nodes_and_edges_of_the_trace(
    trace: Trace, name: str, read: Any, tmp_path: Path
) -> None:
    trace.export(tmp_path / name)
    back = read(tmp_path / name)
    assert {n: (a["kind"], a["norm"], a.get("head")) for n, a in back.nodes(data=True)} == {
        node.id: (
            trace_pb2.NodeKind.Name(node.kind).removeprefix("NODE_KIND_"),
            node.norm,
            node.head if node.HasField("head") else None,
        )
        for node in messages.NODES
    }
    assert sorted((s, t, a["kind"], a["weight"]) for s, t, a in back.edges(data=True)) == sorted(
        (
            edge.source,
            edge.target,
            trace_pb2.EdgeKind.Name(edge.kind).removeprefix("EDGE_KIND_"),
            edge.weight,
        )
        for edge in messages.EDGES
    )


@pytest.mark.parametrize("file_format", ["node-link", "circuit-tracer"])
def test_numbers_that_json_lacks_are_null(
    file_format: januslens.GraphFormat, tmp_path: Path
) -> None:
    assembler = TraceAssembler()
    for response in trace_stream():
        for node in response.layer.nodes:
            if node.id == "L0/p1/MLP_VALUE/n7":
                node.activation = float("inf")
        for edge in response.layer.edges:
            if edge.source == "L0/p1/MLP_VALUE/n8":
                edge.weight = edge.logit_contribution = float("nan")
        assembler.feed(response)
    assembler.result().export(tmp_path / "graph.json", file_format)

    def refused(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    graph = json.loads((tmp_path / "graph.json").read_text(), parse_constant=refused)
    nodes = {node.get("id", node.get("node_id")): node for node in graph["nodes"]}
    assert nodes["L0/p1/MLP_VALUE/n7"]["activation"] is None


def test_ids_of_graphml_edges_differ(trace: Trace, tmp_path: Path) -> None:
    trace.export(tmp_path / "graph.graphml")
    ids = nx.get_edge_attributes(nx.read_graphml(tmp_path / "graph.graphml"), "id")
    assert len(set(ids.values())) == len(messages.EDGES)


def test_frames_are_read_back_from_parquet_and_csv(trace: Trace, tmp_path: Path) -> None:
    for frame in (trace.nodes.reset_index(), trace.edges):
        frame.to_parquet(tmp_path / "rows.parquet")
        frame.to_csv(tmp_path / "rows.csv", index=False)
        stored = pd.read_parquet(tmp_path / "rows.parquet")
        text = pd.read_csv(tmp_path / "rows.csv")
        assert list(stored.columns) == list(text.columns) == list(frame.columns)
        measures = frame.select_dtypes("float64").columns
        pd.testing.assert_frame_equal(stored[measures], frame[measures])
        pd.testing.assert_frame_equal(text[measures].astype("float64"), frame[measures])
        assert list(text["kind"]) == list(stored["kind"]) == list(frame["kind"])


def test_circuit_graph_has_the_parts_of_the_logit(trace: Trace, tmp_path: Path) -> None:
    trace.export(tmp_path / "circuit.json", "circuit-tracer")
    graph = json.loads((tmp_path / "circuit.json").read_text())
    jsonschema.validate(graph, json.loads(SCHEMA.read_text()))
    assert {(x["source"], x["target"]): x["weight"] for x in graph["links"]} == {
        ("p1/BLOCK_INPUT", "p1/PREDICTION"): 0.5,
        ("L0/p1/ATTENTION_OUTPUT", "p1/PREDICTION"): 1.25,
        ("L0/p1/HEAD_OUTPUT/h0", "L0/p1/ATTENTION_OUTPUT"): 1.5,
        ("L0/p1/HEAD_OUTPUT/h1", "L0/p1/ATTENTION_OUTPUT"): -0.25,
        ("L0/p1/MEMORY_VALUE/h0/s0", "L0/p1/HEAD_OUTPUT/h0"): 1.5,
        ("L0/p1/MLP_OUTPUT", "p1/PREDICTION"): 1.75,
        ("L0/p1/MLP_VALUE/n7", "L0/p1/MLP_OUTPUT"): 2.0,
        ("L0/p1/MLP_VALUE/n8", "L0/p1/MLP_OUTPUT"): 0.25,
    }
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len({node["jsNodeId"] for node in graph["nodes"]}) == 9
    source = nodes["L0/p1/MEMORY_VALUE/h0/s0"]
    assert (source["ctx_idx"], source["activation"], source["feature"]) == (0, 0.75, 0)
    embedding = nodes["p1/BLOCK_INPUT"]
    assert (embedding["layer"], embedding["feature"], embedding["clerp"]) == ("E", 1, 'Emb: "␣b"')
    neuron = nodes["L0/p1/MLP_VALUE/n7"]
    assert (neuron["layer"], neuron["activation"], neuron["feature"]) == ("0", 2.0, 7)
    assert neuron["influence"] == pytest.approx(2.0 / 9.0)  # sizes: 2 of 0.5+1.25+...+0.25 = 9
    logit = nodes["p1/PREDICTION"]
    target = messages.trace_header().targets[0]
    assert logit["token_prob"] == target.target_probability
    assert logit["clerp"].endswith(f"(p={target.target_probability:.3f})")
    broken = graph | {"nodes": [logit | {"clerp": "c"}]}
    with pytest.raises(jsonschema.ValidationError, match="does not match"):
        jsonschema.validate(broken, json.loads(SCHEMA.read_text()))


def test_unknown_formats_and_extensions_are_refused(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no graph format has the extension '\.dot'"):
        trace.export(tmp_path / "graph.dot")
    with pytest.raises(ValueError, match="unknown graph format 'dot'; expected one of graphml"):
        trace.export(tmp_path / "graph.json", "dot")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())

"""Nodes and edges as pandas frames and as a networkx graph."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from januslens._extras import require
from januslens._results.nodes import Edge, Node
from januslens._results.token_text import xml_text

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

_COUNTS = ("layer", "position", "head", "source_position", "neuron", "expert", "target_rank")
_MEASURES = (
    "norm",
    "activation",
    "top_probability",
    "entropy_bits",
    "target_probability",
    "target_logit",
)
_NODE_FIELDS = [f.name for f in fields(Node) if f.name not in ("projection", "vector")]
_EDGE_FIELDS = [f.name for f in fields(Edge)]


def node_frame(nodes: Iterable[Node]) -> pd.DataFrame:
    """One row a node, indexed by id; what a node has not is missing (`pd.NA`, NaN or None)."""
    pandas = require("pandas", "analysis", "a frame of nodes")
    rows = [_node_row(node) for node in nodes]
    columns = [*_NODE_FIELDS, *_projection_row(None)]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=columns).set_index("id")
    return frame.astype(dict.fromkeys(_COUNTS, "Int64") | dict.fromkeys(_MEASURES, "float64"))


def edge_frame(edges: Iterable[Edge]) -> pd.DataFrame:
    """One row an edge."""
    pandas = require("pandas", "analysis", "a frame of edges")
    rows = [_edge_row(edge) for edge in edges]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=_EDGE_FIELDS)
    measured = ["weight", "share", "attention", "logit_contribution", "overlap"]
    return frame.astype(dict.fromkeys(measured, "float64"))


def directed_graph(
    known: Mapping[str, Node], nodes: Iterable[Node], edges: Iterable[Edge]
) -> nx.MultiDiGraph[str]:
    """Node ids with attributes; two nodes may be joined by edges of several kinds (the key).

    Attributes are numbers and strings, so that networkx's GraphML, GEXF and JSON writers accept
    them: lists of tokens are JSON, and characters that XML cannot hold are escaped.
    """
    networkx = require("networkx", "analysis", "a graph")
    graph: nx.MultiDiGraph[str] = networkx.MultiDiGraph()
    for node in nodes:
        graph.add_node(node.id, **_present(_node_row(node), without="id"))
    for edge in edges:
        if edge.source not in graph:  # an earlier layer's output, in the view of one layer
            graph.add_node(edge.source, **_present(_node_row(known[edge.source]), without="id"))
        attributes = _present(_edge_row(edge), without="source target")
        graph.add_edge(edge.source, edge.target, key=str(edge.kind), **attributes)
    return graph


def _node_row(node: Node) -> dict[str, Any]:
    row = {name: getattr(node, name) for name in _NODE_FIELDS}
    return row | {"kind": str(node.kind)} | _projection_row(node)


def _projection_row(node: Node | None) -> dict[str, Any]:
    """The reading of a node; every column is there, whether the node has one or not."""
    read = node.projection if node else None
    return {
        "top_token": read.top[0].token.text if read and read.top else None,
        "top_probability": read.top[0].probability if read and read.top else None,
        "top_tokens": [token.text for token in read.top_tokens] if read else None,
        "bottom_tokens": [token.text for token in read.bottom_tokens] if read else None,
        "entropy_bits": read.entropy_bits if read else None,
        "target_rank": read.target_rank if read else None,
        "target_probability": read.target_probability if read else None,
        "target_logit": read.target_logit if read else None,
    }


def _edge_row(edge: Edge) -> dict[str, Any]:
    row = {name: getattr(edge, name) for name in _EDGE_FIELDS}
    return row | {"kind": str(edge.kind)}


def _present(row: Mapping[str, Any], without: str) -> dict[str, Any]:
    left_out = without.split()
    return {
        name: _attribute(value)
        for name, value in row.items()
        if value is not None and name not in left_out
    }


def _attribute(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps([xml_text(text) for text in value], ensure_ascii=False)
    return xml_text(value) if isinstance(value, str) else value

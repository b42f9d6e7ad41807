"""Write the flow graph of a trace to files that other programs read.

GraphML, GEXF and node-link JSON have every node and edge of the trace. A circuit-tracer file has
the parts that add up to one logit, as circuit-tracer and Neuronpedia show them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from januslens.results.exports import require
from januslens.results.kinds import NodeKind

if TYPE_CHECKING:
    import networkx as nx

    from januslens.results.contributions import ContributionTree
    from januslens.results.graph import Node
    from januslens.results.trace import PositionTarget, Trace

GraphFormat = Literal["graphml", "gexf", "node-link", "circuit-tracer"]
GRAPH_FORMATS: tuple[GraphFormat, ...] = get_args(GraphFormat)
_BY_EXTENSION: Mapping[str, GraphFormat] = {
    ".graphml": "graphml",
    ".gexf": "gexf",
    ".json": "node-link",
}


def graph_format(path: str | PathLike[str], requested: str | None) -> GraphFormat:
    """Return the format of a graph file: the requested one, or else that of the file's extension.

    Raises:
        ValueError: The requested format or the extension is unknown.
    """
    extension = Path(path).suffix.lower()
    for known in GRAPH_FORMATS:
        if known == (requested or _BY_EXTENSION.get(extension)):
            return known
    if requested is not None:
        raise ValueError(
            f"unknown graph format {requested!r}; expected one of {', '.join(GRAPH_FORMATS)}"
        )
    raise ValueError(
        f"no graph format has the extension {extension!r}; expected one of "
        f"{', '.join(_BY_EXTENSION)}, or a format among {', '.join(GRAPH_FORMATS)}"
    )


def write_graph(trace: Trace, path: str | PathLike[str], requested: str | None) -> None:
    """Write a trace's flow graph; the extension of the file selects the format by default."""
    written_as = graph_format(path, requested)
    if written_as == "circuit-tracer":
        _write_json(path, circuit_graph(trace))
        return
    networkx, graph = require("networkx", "analysis", "a graph"), trace.to_networkx()
    if written_as == "graphml":
        networkx.write_graphml(_with_distinct_keys(graph), path)
    elif written_as == "gexf":
        networkx.write_gexf(graph, path)
    else:
        _write_json(path, networkx.node_link_data(graph, edges="edges"))


def _write_json(path: str | PathLike[str], content: Mapping[str, Any]) -> None:
    """Write JSON, which has neither NaN nor infinity: such a number becomes null."""
    Path(path).write_text(json.dumps(_finite(content), allow_nan=False), encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_distinct_keys(graph: nx.MultiDiGraph[str]) -> nx.MultiDiGraph[str]:
    """Return the graph with a key for each edge that no other edge has.

    networkx writes the keys as ids of the edges, which must differ within a GraphML file.
    """
    distinct = graph.__class__()
    distinct.add_nodes_from(graph.nodes(data=True))
    for source, target, kind, attributes in graph.edges(keys=True, data=True):
        distinct.add_edge(source, target, key=f"{source} {kind} {target}", **attributes)
    return distinct


def circuit_graph(trace: Trace) -> dict[str, Any]:
    """Return the parts of the last target's logit as a graph in the format of circuit-tracer.

    The nodes are those of `trace.why()`, without a limit, and the logit. Each node links to the one
    that it is a part of; the weight is its direct contribution to the target's logit.

    Raises:
        ValueError: The trace was requested without logit contributions, or without the parts of
            the residual stream.
    """
    tree = trace.why(at_most=len(trace.node_list))
    target = trace.target()
    logit = _logit_node(trace, target)
    influences = _influences(tree)
    parts = [part for _, part in tree.lines()][1:]
    return {
        "metadata": _metadata(trace),
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": logit["node_id"],
            "sg_pos": "",
        },
        "nodes": [*(_part_node(trace, part, influences[part.node.id]) for part in parts), logit],
        "links": [
            {"source": part.node.id, "target": whole, "weight": part.contribution}
            for whole, part in _links(tree, logit["node_id"])
        ],
    }


def _links(tree: ContributionTree, node_id: str) -> Iterator[tuple[str, ContributionTree]]:
    """Return every part of a tree with the id of the node that it is a part of."""
    for part in tree.parts:
        yield node_id, part
        yield from _links(part, part.node.id)


def _influences(tree: ContributionTree) -> dict[str, float]:
    """Return the influence of each part: the summed size of it and all larger parts, up to 1.

    A viewer that shows the nodes below a limit thus shows the largest parts.
    """
    sizes = {part.node.id: abs(part.contribution) for _, part in tree.lines() if part is not tree}
    largest = sorted(sizes, key=lambda node_id: -sizes[node_id])
    total = math.fsum(sizes.values()) or 1.0
    sums = accumulate(sizes[node_id] for node_id in largest)
    return {node_id: min(1.0, size / total) for node_id, size in zip(largest, sums, strict=True)}


def _metadata(trace: Trace) -> dict[str, Any]:
    prompt, made_by = "".join(token.text for token in trace.prompt_tokens), trace.provenance
    slug = re.sub("[^a-z0-9]+", "-", f"{made_by.model} {prompt}".lower()).strip("-")
    return {
        "slug": slug,
        "scan": made_by.model,
        "transcoder_list": [],
        "prompt_tokens": [token.text for token in trace.prompt_tokens],
        "prompt": prompt,
        "node_threshold": 1.0,
        "schema_version": 1,
        "revision": made_by.revision,
    }


def _logit_node(trace: Trace, target: PositionTarget) -> dict[str, Any]:
    other = "" if trace.header.other is None else f' minus "{trace.header.other}"'
    return _circuit_node(
        node_id=f"p{target.position}/{NodeKind.PREDICTION}",
        feature=target.target.id,
        layer=str(trace.header.sizes.n_layers + 1),
        ctx_idx=target.position,
        feature_type="logit",
        token_prob=target.target_probability,
        is_target_logit=True,
        clerp=f'Output "{target.target}"{other} (p={target.target_probability:.3f})',
    )


_FEATURE_TYPES = {
    NodeKind.ATTENTION_OUTPUT: "attention",
    NodeKind.MIXER_OUTPUT: "mixer",
    NodeKind.MLP_OUTPUT: "mlp",
    NodeKind.HEAD_OUTPUT: "attention head",
    NodeKind.MIXER_HEAD: "mixer head",
    NodeKind.MEMORY_VALUE: "attention source",
    NodeKind.MLP_VALUE: "mlp neuron",
    NodeKind.ATTENTION_BIAS: "bias",
    NodeKind.MLP_BIAS: "bias",
}


def _part_node(trace: Trace, part: ContributionTree, influence: float) -> dict[str, Any]:
    node = part.node
    position = node.position or 0
    is_embedding = node.kind is NodeKind.BLOCK_INPUT and not node.layer
    activation = node.activation if part.attention is None else part.attention
    return _circuit_node(
        node_id=node.id,
        feature=trace.prompt_tokens[position].id if is_embedding else _unit(node),
        layer="E" if is_embedding else str(node.layer),
        ctx_idx=position if node.source_position is None else node.source_position,
        feature_type="embedding"
        if is_embedding
        else _FEATURE_TYPES.get(node.kind, "residual stream"),
        clerp=_label(trace, node, is_embedding),
        influence=influence,
        activation=activation,
    )


def _unit(node: Node) -> int | None:
    """Return the neuron or head of a node."""
    return node.head if node.neuron is None else node.neuron


def _label(trace: Trace, node: Node, is_embedding: bool) -> str:
    if is_embedding:
        return f'Emb: "{trace.prompt_tokens[node.position or 0]}"'
    expert = "" if node.expert is None else f"expert {node.expert} "
    unit = "" if _unit(node) is None else f" {_unit(node)}"
    name = f"L{node.layer} {expert}{_FEATURE_TYPES.get(node.kind, 'residual stream')}{unit}"
    if node.projection is None or not node.projection.top_tokens:
        return name
    return f"{name}: {' '.join(map(str, node.projection.top_tokens))}"


def _circuit_node(*, node_id: str, **fields: Any) -> dict[str, Any]:
    """Return a node with every field of the format."""
    constant = {
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": node_id.replace("/", "-"),
        "influence": None,
        "activation": None,
    }
    return {"node_id": node_id} | constant | fields

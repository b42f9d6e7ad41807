"""The strongest way back from a node: what it was mostly made of, and that of what."""

from __future__ import annotations

from januslens._results.graph import GraphView, Part
from januslens._results.kinds import EdgeKind, NodeKind
from januslens._results.nodes import Edge

# A remainder or a constant explains nothing further.
_DEAD_ENDS = {NodeKind.OTHER, NodeKind.ATTENTION_BIAS, NodeKind.MLP_BIAS}


def strongest_path(graph: GraphView, start: str) -> tuple[Part, ...]:
    """From the node `start` back along the strongest edges, until nothing leads on.

    At a sum the path takes the part that adds most to the target's logit (without logit
    contributions, the one of largest |share|); elsewhere the edge of the largest weight. Each
    step's edge enters the step before it; the first has none.

    Raises:
        KeyError: There is no such node.
    """
    path = [Part(graph.node(start), None)]
    while edge := _strongest_edge(graph, path[-1].node.id):
        path.append(Part(graph.node(edge.source), edge))
    return tuple(path)


def _strongest_edge(graph: GraphView, node_id: str) -> Edge | None:
    edges = [
        edge for edge in graph.edges_into(node_id) if graph.node(edge.source).kind not in _DEAD_ENDS
    ]
    heads = [e for e in edges if graph.node(e.source).kind is NodeKind.ATTENTION_CONCAT]
    if heads:  # the rows of W_O split the same sum, but say nothing of what was attended to
        return heads[0]
    parts = [edge for edge in edges if edge.kind is EdgeKind.PART]
    if parts and all(part.logit_contribution is not None for part in parts):
        return max(parts, key=lambda part: part.logit_contribution or 0.0)
    if parts:
        return max(parts, key=lambda part: abs(part.share or 0.0))
    return max(edges, key=lambda edge: abs(edge.weight), default=None)

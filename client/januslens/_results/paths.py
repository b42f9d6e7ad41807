"""The strongest way back from a node: what it was mostly made of, and that of what."""

from __future__ import annotations

from januslens._results.graph import GraphView, Part
from januslens._results.kinds import EdgeKind, NodeKind
from januslens._results.nodes import Edge, Node

# A remainder or a constant explains nothing further.
_DEAD_ENDS = {NodeKind.OTHER, NodeKind.ATTENTION_BIAS, NodeKind.MLP_BIAS}
_ATTENTION_RESULTS = {NodeKind.ATTENTION_SUM, NodeKind.ATTENTION_OUTPUT}


def strongest_path(graph: GraphView, start: str) -> tuple[Part, ...]:
    """From the node `start` back along the strongest edges, until nothing leads on.

    At a sum the path takes the part that adds most to the target's logit (without logit
    contributions, the one of largest |share|), at attention's result the heads together, and
    elsewhere the edge of the largest weight. A step's edge, if it has one, enters the step before.

    Raises:
        KeyError: There is no such node.
    """
    path = [Part(graph.node(start), None)]
    while step := _step_back(graph, path[-1].node):
        path.append(step)
    return tuple(path)


def _step_back(graph: GraphView, node: Node) -> Part | None:
    if node.kind in _ATTENTION_RESULTS and (heads := _heads_together(graph, node)):
        return Part(heads, None)
    edges = [e for e in graph.edges_into(node) if graph.node(e.source).kind not in _DEAD_ENDS]
    edge = _strongest(edges)
    return Part(graph.node(edge.source), edge) if edge else None


def _heads_together(graph: GraphView, node: Node) -> Node | None:
    """Attention's result has two partitions; the heads say what was attended to, W_O's rows not."""
    wanted = f"L{node.layer}/p{node.position}/{NodeKind.ATTENTION_CONCAT}"
    return graph.known_nodes.get(wanted)


def _strongest(edges: list[Edge]) -> Edge | None:
    parts = [edge for edge in edges if edge.kind is EdgeKind.PART]
    if parts and all(part.logit_contribution is not None for part in parts):
        return max(parts, key=lambda part: part.logit_contribution or 0.0)
    if parts:
        return max(parts, key=lambda part: abs(part.share or 0.0))
    return max(edges, key=lambda edge: abs(edge.weight), default=None)

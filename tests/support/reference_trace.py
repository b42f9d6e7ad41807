"""The whole flow graph that a trace must show, whatever it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from januslens_server.results import EdgeKind
from januslens_server.specs import Selection
from tests.support.reference_block import BlockOracle
from tests.support.reference_graph import ExpectedGraph, ExpectedNode, PromptOracle


def expected_graph(
    oracle: PromptOracle, layers: Sequence[int], positions: Sequence[int], selection: Selection
) -> ExpectedGraph:
    """Every node and edge of these layers and positions, both ascending."""
    graph = ExpectedGraph()
    for position in positions:
        below = None
        for layer in layers:
            BlockOracle(oracle, graph, layer, position, selection).add(below)
            below = layer
        if below == len(oracle.passes) - 1:
            _add_top(oracle, graph, position)
    return graph


def _add_top(oracle: PromptOracle, graph: ExpectedGraph, position: int) -> None:
    """FINAL_NORM and PREDICTION, the same vector: what the unembedding takes."""
    residual = oracle.residual[position]
    normed = oracle.model.final_norm(residual)
    source = f"L{len(oracle.passes) - 1}/p{position}/BLOCK_OUTPUT"
    norm, prediction = f"p{position}/FINAL_NORM", f"p{position}/PREDICTION"
    graph.nodes |= {norm: ExpectedNode(normed), prediction: ExpectedNode(normed)}
    graph.edge(source, norm, EdgeKind.NORM, float(residual.norm()))
    graph.edge(norm, prediction, EdgeKind.PROJECT, float(normed.norm()))

"""The top of the graph: what the final norm makes of the last residual, and the prediction."""

from __future__ import annotations

import torch

from januslens_server.graph.flow import Flow, FlowBuilder
from januslens_server.results import EdgeKind, Node, NodeKind


def final_flow(
    last_layer: int, position: int, residual: torch.Tensor, normed: torch.Tensor
) -> Flow:
    """FINAL_NORM and PREDICTION above the last block, from `[d_model]` before and after the norm.

    Both are read by the unembedding alone: they have passed the final norm already.
    """
    flow = FlowBuilder(last_layer, position, direction=None)
    nodes = [Node(NodeKind.FINAL_NORM, position), Node(NodeKind.PREDICTION, position)]
    norm, prediction = flow.nodes(nodes, torch.stack([normed, normed]))
    below = Node(NodeKind.BLOCK_OUTPUT, position, last_layer)
    flow.edges(EdgeKind.NORM, [below.id], [norm], residual.norm()[None])
    flow.edges(EdgeKind.PROJECT, [norm], [prediction], normed.norm()[None])
    return flow.build()

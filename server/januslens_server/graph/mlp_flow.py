"""The MLP at one position as key-value memory: which neurons fire, and what each writes."""

from __future__ import annotations

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.weighted_rows import WeightedRows, add_weighted_rows
from januslens_server.graph.weights import MlpWeights
from januslens_server.results import EdgeKind, Node, NodeKind
from januslens_server.specs import Selection


def add_mlp(
    flow: FlowBuilder,
    mlp_input: str,
    acts: LayerActivations,
    weights: MlpWeights,
    selection: Selection,
) -> str:
    """Add everything between MLP_INPUT and MLP_OUTPUT; gives the latter's id."""
    activations = acts.neurons[flow.position].float()
    rows = WeightedRows(
        NodeKind.MLP_VALUE, NodeKind.MLP_BIAS, weights.ff2, weights.row_norms, weights.bias
    )
    total = acts.mlp_output[flow.position].float()
    output, values, picked = add_weighted_rows(
        flow, NodeKind.MLP_OUTPUT, total, rows, activations, selection
    )
    _add_keys(flow, NodeKind.MLP_KEY, mlp_input, values, weights.ff1, activations, picked)
    if weights.up is not None:
        _add_keys(flow, NodeKind.MLP_UP, mlp_input, values, weights.up, activations, picked)
    return output


def _add_keys(
    flow: FlowBuilder,
    kind: NodeKind,
    mlp_input: str,
    values: list[str],
    columns: torch.Tensor,
    activations: torch.Tensor,
    picked: torch.Tensor,
) -> None:
    """The columns `[d_model, d_mlp]` that the input is matched with, each before its value."""
    nodes = [Node(kind, flow.position, flow.layer, neuron=neuron) for neuron in picked.tolist()]
    fired = activations[picked]
    keys = flow.nodes(nodes, columns[:, picked].T.float(), activations=fired)
    flow.edges(EdgeKind.ACTIVATE, [mlp_input] * len(keys), keys, fired)
    flow.edges(EdgeKind.ACTIVATE, keys, values, fired)

"""The MLP at one position as key-value memory: which neurons fire, and what each writes."""

from __future__ import annotations

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.weighted_rows import (
    Neurons,
    Result,
    RowKinds,
    add_weighted_rows,
    neuron_nodes,
)
from januslens_server.graph.weights import MlpWeights
from januslens_server.results import EdgeKind, NodeKind
from januslens_server.specs import Selection

MLP_KINDS = RowKinds(NodeKind.MLP_VALUE, NodeKind.MLP_BIAS)


def add_mlp(
    flow: FlowBuilder,
    mlp_input: str,
    acts: LayerActivations,
    weights: MlpWeights,
    selection: Selection,
    result: Result,
) -> str:
    """Add everything between the MLP's input and its raw result; gives the latter's id."""
    if not flow.shows(*MLP_KINDS, NodeKind.MLP_KEY, NodeKind.MLP_UP, NodeKind.OTHER):
        return flow.node(result.kind, result.vector)
    row = weights.row(acts, flow.position)
    added = add_weighted_rows(flow, row.terms, MLP_KINDS, selection, result)
    fired = row.terms.activations[added.neurons.picked]
    _add_keys(flow, NodeKind.MLP_KEY, mlp_input, row.ff1, fired, added.neurons)
    if row.up is not None:
        _add_keys(flow, NodeKind.MLP_UP, mlp_input, row.up, fired, added.neurons)
    return added.total


def _add_keys(
    flow: FlowBuilder,
    kind: NodeKind,
    mlp_input: str,
    columns: torch.Tensor,
    fired: torch.Tensor,
    neurons: Neurons,
) -> None:
    """The columns `[d_model, n]` that the input is matched with, each before its value."""
    if not flow.shows(kind):
        return
    nodes = neuron_nodes(flow, kind, neurons.places)
    keys = flow.nodes(nodes, columns[:, neurons.picked].T, activations=fired)
    flow.edges(EdgeKind.ACTIVATE, [mlp_input] * len(keys), keys, fired)
    flow.edges(EdgeKind.ACTIVATE, keys, neurons.ids, fired)

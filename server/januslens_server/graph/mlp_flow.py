"""The MLP at one position as key-value memory: which neurons fire, and what each writes."""

from __future__ import annotations

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.terms import WeightedRows
from januslens_server.graph.weighted_rows import (
    Added,
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
    row = weights.row(acts, flow.position)
    added = add_weighted_rows(flow, row.terms, MLP_KINDS, selection, result)
    _add_keys(flow, NodeKind.MLP_KEY, mlp_input, row.terms, row.ff1, added)
    if row.up is not None:
        _add_keys(flow, NodeKind.MLP_UP, mlp_input, row.terms, row.up, added)
    return added.total


def _add_keys(
    flow: FlowBuilder,
    kind: NodeKind,
    mlp_input: str,
    terms: WeightedRows,
    columns: torch.Tensor,
    added: Added,
) -> None:
    """The columns `[d_model, n]` that the input is matched with, each before its value."""
    fired = terms.activations[added.picked]
    nodes = neuron_nodes(flow, kind, terms, added.picked)
    keys = flow.nodes(nodes, columns[:, added.picked].T, activations=fired)
    flow.edges(EdgeKind.ACTIVATE, [mlp_input] * len(keys), keys, fired)
    flow.edges(EdgeKind.ACTIVATE, keys, added.neurons, fired)

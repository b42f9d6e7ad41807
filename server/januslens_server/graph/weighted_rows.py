"""A sum of weight rows with activations as coefficients: what W_O and FF2 both write."""

from __future__ import annotations

from typing import NamedTuple

import torch

from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.selection import extremes, left_out
from januslens_server.graph.terms import WeightedRows
from januslens_server.results import Node, NodeKind
from januslens_server.specs import Selection


class Result(NamedTuple):
    """A sublayer's raw result: the kind of its node and the vector `[d_model]`."""

    kind: NodeKind
    vector: torch.Tensor


class RowKinds(NamedTuple):
    """The kinds of a sum's weight rows and bias."""

    neuron: NodeKind
    bias: NodeKind


class Added(NamedTuple):
    """Ids of the sum and of its neurons, and the neurons' indices `[k]` among the rows."""

    total: str
    neurons: list[str]
    picked: torch.Tensor


def add_weighted_rows(
    flow: FlowBuilder,
    terms: WeightedRows,
    kinds: RowKinds,
    selection: Selection,
    result: Result,
) -> Added:
    """Add `result = activations @ rows + bias` and its terms.

    Neurons are picked by `activation * norm(row)` (VISIT, appendix A.5).
    """
    picked = extremes(
        terms.activations * terms.norms, selection.top_neurons, selection.bottom_neurons
    )
    rows, weights = terms.rows[picked], terms.activations[picked]
    neurons = flow.nodes(neuron_nodes(flow, kinds.neuron, terms, picked), rows, activations=weights)
    total = flow.node(result.kind, result.vector)
    flow.parts(neurons, total, weights[:, None] * rows, result.vector)
    if len(picked) < len(terms.activations):
        kept = left_out(len(terms.activations), picked)
        rest = torch.where(kept, terms.activations, 0.0) @ terms.rows
        other = flow.other(Node(result.kind, flow.position, flow.layer), rest)
        flow.parts([other], total, rest[None], result.vector)
    if terms.bias is not None:
        bias = flow.node(kinds.bias, terms.bias)
        flow.parts([bias], total, terms.bias[None], result.vector)
    return Added(total, neurons, picked)


def neuron_nodes(
    flow: FlowBuilder, kind: NodeKind, terms: WeightedRows, picked: torch.Tensor
) -> list[Node]:
    """The nodes of the `picked` `[k]` rows."""
    where = picked if terms.neurons is None else terms.neurons[picked]
    experts = [None] * len(picked) if terms.experts is None else terms.experts[picked].tolist()
    return [
        Node(kind, flow.position, flow.layer, neuron=neuron, expert=expert)
        for neuron, expert in zip(where.tolist(), experts, strict=True)
    ]

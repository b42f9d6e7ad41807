"""A sum of weight rows with activations as coefficients: what W_O and FF2 both write."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.selection import extremes, left_out
from januslens_server.results import Node, NodeKind
from januslens_server.specs import Selection


@dataclass(frozen=True)
class WeightedRows:
    """Rows `[n, d_model]` with their norms `[n]`, a bias `[d_model]`, and their nodes' kinds."""

    neuron_kind: NodeKind
    bias_kind: NodeKind
    rows: torch.Tensor
    norms: torch.Tensor
    bias: torch.Tensor | None


def add_weighted_rows(
    flow: FlowBuilder,
    total_kind: NodeKind,
    total: torch.Tensor,
    weighted: WeightedRows,
    activations: torch.Tensor,
    selection: Selection,
) -> tuple[str, list[str], torch.Tensor]:
    """Add `total = activations @ rows + bias` `[d_model]` and its terms.

    Neurons are picked by `activation * norm(row)` (VISIT, section 3.2). Gives the sum's id, the
    neurons' ids and their indices `[k]`.
    """
    picked = extremes(activations * weighted.norms, selection.top_neurons, selection.bottom_neurons)
    rows, weights = weighted.rows[picked].float(), activations[picked]
    nodes = [
        Node(weighted.neuron_kind, flow.position, flow.layer, neuron=neuron)
        for neuron in picked.tolist()
    ]
    neurons = flow.nodes(nodes, rows, activations=weights)
    total_id = flow.node(total_kind, total)
    flow.parts(neurons, total_id, weights[:, None] * rows, total)
    if len(picked) < len(activations):
        rest = torch.where(left_out(len(activations), picked), activations, 0.0) @ weighted.rows
        other = flow.other(Node(total_kind, flow.position, flow.layer), rest)
        flow.parts([other], total_id, rest[None], total)
    if weighted.bias is not None:
        bias = flow.node(weighted.bias_kind, weighted.bias)
        flow.parts([bias], total_id, weighted.bias[None], total)
    return total_id, neurons, picked

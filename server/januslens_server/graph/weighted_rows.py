"""Add the results of W_O and FF2, which sum weight rows, and their largest terms as nodes.

Terms are selected as in VISIT (section 3, appendix A.5). OTHER is the sum of all other terms. Sorts
are stable: ties are broken by the lower index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.weights import WeightedRows
from januslens_server.results import Members, NodeKind, NodeRun
from januslens_server.specs import Selection


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return indices `[..., count]` of the largest `scores` `[..., n]`, largest first; 0 = all."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count] if count else order


def extremes(scores: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
    """Return indices of the `top` largest `scores` `[n]`, then of the `bottom` smallest others.

    `top` 0 means all; `bottom` 0 means none.
    """
    highest = largest(scores, top)
    if not bottom or len(highest) == len(scores):
        return highest
    lowest = scores.sort(stable=True).indices[:bottom]
    return torch.cat([highest, lowest[~torch.isin(lowest, highest)]])


def left_out(size: int, picked: torch.Tensor) -> torch.Tensor:
    """Return a mask `[..., size]` that is True for indices that are not in `picked` `[..., k]`."""
    mask = torch.ones(*picked.shape[:-1], size, dtype=torch.bool, device=picked.device)
    return mask.scatter_(-1, picked, value=False)


class Result(NamedTuple):
    """A sublayer's raw result: the kind of its node and the vector `[d_model]`."""

    kind: NodeKind
    vector: torch.Tensor


class RowKinds(NamedTuple):
    """The kinds of nodes for the weight rows and the bias of a sum."""

    neuron: NodeKind
    bias: NodeKind


class Neurons(NamedTuple):
    """The selected rows of a sum: ids of their nodes, indices `[k]`, and expert and neuron.

    `experts` is None in a dense MLP.
    """

    ids: list[str]
    picked: torch.Tensor
    numbers: list[int]
    experts: list[int] | None


class Added(NamedTuple):
    """The id of a sum, and its selected rows."""

    total: str
    neurons: Neurons


def add_weighted_rows(
    flow: FlowBuilder,
    terms: WeightedRows,
    kinds: RowKinds,
    selection: Selection,
    result: Result,
    *,
    replaced: bool = False,
    picked: torch.Tensor | None = None,
) -> Added:
    """Add a sum `activations @ rows + bias` and its terms.

    Rows are selected by `activation * norm(row)` (VISIT, appendix A.5), or by their effect, unless
    `picked` `[k]` has their indices.
    `replaced` means that an intervention changed the sum; OTHER is then the sum without the other
    nodes.
    """
    if picked is None:
        effect = flow.effect(selection.by)
        scores = terms.activations * (terms.norms if effect is None else terms.rows @ effect)
        picked = extremes(scores, selection.top_neurons, selection.bottom_neurons)
    numbers = (picked if terms.neurons is None else terms.neurons[picked]).tolist()
    experts = None if terms.experts is None else terms.experts[picked].tolist()
    ids = flow.nodes(
        [neuron_nodes(flow, kinds.neuron, numbers, experts)],
        terms.rows[picked] if flow.keeps_vectors else None,
        activations=terms.activations[picked],
        norms=terms.norms[picked],
    )
    neurons = Neurons(ids, picked, numbers, experts)
    total = flow.node(result.kind, result.vector)
    flow.weighted_parts(neurons.ids, total, terms, picked, result.vector)
    ids, parts = list[str](), list[torch.Tensor]()
    if (replaced or len(picked) < len(terms.activations)) and flow.shows(NodeKind.OTHER):
        if replaced:
            bias = 0.0 if terms.bias is None else terms.bias
            taken = terms.activations[picked] @ terms.rows[picked]
            rest = (result.vector - taken - bias)[None]
        else:
            kept = left_out(len(terms.activations), picked)
            rest = (torch.where(kept, terms.activations, 0.0) @ terms.rows)[None]
        totals = NodeRun(result.kind, flow.position, flow.layer)
        ids += flow.others(totals, rest, [_left_out(terms, picked)])
        parts.append(rest)
    if terms.bias is not None:
        ids.append(flow.node(kinds.bias, terms.bias))
        parts.append(terms.bias[None])
    if parts:
        flow.parts(ids, total, torch.cat(parts), result.vector)
    return Added(total, neurons)


def _left_out(terms: WeightedRows, picked: torch.Tensor) -> Members:
    """Return the rows that are not picked; those of a mixture depend on the routed experts."""
    size, population, listed = len(terms.rows), [len(terms.rows)], picked.tolist()
    if terms.experts is not None and terms.neurons is not None:
        routed = terms.experts.unique().tolist()
        width = size // max(1, len(routed))
        experts, neurons = terms.experts[picked].tolist(), terms.neurons[picked].tolist()
        population += routed
        listed = [expert * width + neuron for expert, neuron in zip(experts, neurons, strict=True)]
    return Members.left_out(population, size, listed)


def neuron_nodes(
    flow: FlowBuilder, kind: NodeKind, neurons: list[int], experts: list[int] | None
) -> NodeRun:
    """Return the nodes for rows with these neurons and experts (None in a dense MLP)."""
    return NodeRun(kind, flow.position, flow.layer, neurons=neurons, experts=experts)

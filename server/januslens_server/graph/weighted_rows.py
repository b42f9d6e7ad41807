"""Add the results of W_O and FF2, which sum weight rows, and their largest terms as nodes.

Terms are selected as in VISIT (section 3, appendix A.5). OTHER is the sum of all other terms. Sorts
are stable: ties are broken by the lower index.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.weights import WeightedRows
from januslens_server.results import Members, NodeKind, NodeRun
from januslens_server.specs import Selection
from januslens_server.transfer import to_device


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return indices `[..., count]` of the largest `scores` `[..., n]`, largest first; 0 = all."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count] if count else order


class Picked(NamedTuple):
    """Indices of selected terms `[k]`, on the host and on the device."""

    numbers: list[int]
    rows: torch.Tensor


def extremes(scores: torch.Tensor, top: int, bottom: int) -> Picked:
    """Return indices of the `top` largest `scores` `[n]`, then of the `bottom` smallest others.

    `top` 0 means all; `bottom` 0 means none. The host waits for the indices once.
    """
    highest = largest(scores, top)
    if not bottom or len(highest) == len(scores):
        return Picked(highest.tolist(), highest)
    lowest = scores.sort(stable=True).indices[:bottom]
    index = torch.cat([highest, lowest])
    numbers = index.tolist()
    different = list(dict.fromkeys(numbers))
    if len(different) < len(numbers):
        return Picked(different, to_device(different, index.device))
    return Picked(numbers, index)


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
    numbers: list[int] | None = None,
) -> Added:
    """Add a sum `activations @ rows + bias` and its terms.

    Rows are selected by `activation * norm(row)` (VISIT, appendix A.5), or by their effect, unless
    `numbers` has their indices.
    `replaced` means that an intervention changed the sum; OTHER is then the sum without the other
    nodes.
    """
    if numbers is None:
        effect = flow.effect(selection.by)
        scores = terms.activations * (terms.norms if effect is None else terms.rows @ effect)
        numbers, picked = extremes(scores, selection.top_neurons, selection.bottom_neurons)
    else:
        picked = to_device(numbers, terms.rows.device)
    units = numbers if terms.neurons is None else terms.neurons[numbers].tolist()
    experts = None if terms.experts is None else terms.experts[numbers].tolist()
    ids = flow.nodes(
        [neuron_nodes(flow, kinds.neuron, units, experts)],
        terms.rows[picked] if flow.keeps_vectors else None,
        activations=terms.activations[picked],
        norms=terms.norms[picked],
    )
    neurons = Neurons(ids, picked, units, experts)
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
        ids += flow.others(totals, rest, [_left_out(terms, numbers)])
        parts.append(rest)
    if terms.bias is not None:
        ids.append(flow.node(kinds.bias, terms.bias))
        parts.append(terms.bias[None])
    if parts:
        flow.parts(ids, total, torch.cat(parts), result.vector)
    return Added(total, neurons)


def _left_out(terms: WeightedRows, numbers: list[int]) -> Members:
    """Return the rows that are not picked; those of a mixture depend on the routed experts."""
    size, population = len(terms.rows), [len(terms.rows)]
    if terms.experts is None or terms.neurons is None:
        return Members.left_out(population, size, numbers)
    routed = np.unique(terms.experts).tolist()
    width = size // max(1, len(routed))
    listed = terms.experts[numbers] * width + terms.neurons[numbers]
    return Members.left_out(population + routed, size, listed.tolist())


def neuron_nodes(
    flow: FlowBuilder, kind: NodeKind, neurons: list[int], experts: list[int] | None
) -> NodeRun:
    """Return the nodes for rows with these neurons and experts (None in a dense MLP)."""
    return NodeRun(kind, flow.position, flow.layer, neurons=neurons, experts=experts)

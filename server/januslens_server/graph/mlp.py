"""The MLP at one position as a key-value memory: dense MLPs and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
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
from januslens_server.graph.weights import Finish, MlpRow, MlpWeights, WeightedRows
from januslens_server.results import EdgeKind, NodeKind
from januslens_server.specs import Selection, Unit
from januslens_server.transfer import to_device


@dataclass(frozen=True)
class DenseMlp:
    """Weights of a dense MLP.

    `ff1` (in a gated MLP, the gate) and `up` are `[d_model, d_mlp]`, `ff2` is `[d_mlp, d_model]`,
    and `row_norms` `[d_mlp]` are the norms of its rows.
    """

    ff1: torch.Tensor
    up: torch.Tensor | None
    ff2: torch.Tensor
    bias: torch.Tensor | None
    row_norms: torch.Tensor
    finish: Finish | None

    def row(self, acts: LayerActivations, position: int) -> MlpRow:
        """Return the MLP at one position, with the captured activations."""
        if acts.neurons is None:
            raise ValueError("no neurons captured; expected those of a dense MLP")
        activations = acts.neurons[acts.row(position)].float()
        terms = WeightedRows(activations, self.ff2, self.row_norms, self.bias)
        return MlpRow(terms, self.ff1, self.up)


# A function from the results of FF1, and in a gated MLP from those of gate and up, to neurons.
Activation = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Expert:
    """Weights of one expert: `ff1` (if gated, the gate), `up` if gated, and `ff2`.

    `ff1` and `up` are `[d_in, d_mlp]`, `ff2` is `[d_mlp, d_in]`. The width of what an expert reads
    and writes, `d_in`, is `d_model`, or that of latent vectors.
    """

    ff1: torch.Tensor
    ff1_bias: torch.Tensor | None
    up: torch.Tensor | None
    up_bias: torch.Tensor | None
    ff2: torch.Tensor
    ff2_bias: torch.Tensor | None
    activation: Activation

    def hidden(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the results `[..., d_mlp]` of FF1, or of gate and up, for `x` `[..., d_in]`."""
        found = [x @ self.ff1 if self.ff1_bias is None else x @ self.ff1 + self.ff1_bias]
        if self.up is not None:
            found.append(x @ self.up if self.up_bias is None else x @ self.up + self.up_bias)
        return found

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """Return the neurons `[..., d_mlp]`, which enter `ff2`, for `x` `[..., d_in]`."""
        return self.activation(*self.hidden(x))


@dataclass(frozen=True)
class ExpertMlp:
    """A mixture of experts; `expert` reads the weights of one expert in the residual basis.

    `bias` `[d_model]` is added to the weighted sum of the experts' results, or None.
    """

    expert: Callable[[int], Expert]
    finish: Finish | None
    bias: torch.Tensor | None = None

    def row(self, acts: LayerActivations, position: int) -> MlpRow:
        """Return the MLP at one position, with the neurons of all routed experts in a row.

        Activations include the router's weights. They are recomputed from the MLP's input, because
        the model's own kernels do not return them.
        """
        if acts.routing is None:
            raise ValueError("no routing captured; expected that of a mixture of experts")
        row = acts.row(position)
        x = acts.mlp_input[row].float()
        ids = acts.routing.experts[row].tolist()
        weights = acts.routing.weights[row].float()
        experts = [self.expert(i) for i in ids]
        neurons = [
            expert.neurons(acts.routing.read(x, row, slot)) for slot, expert in enumerate(experts)
        ]
        if acts.neuron_change is not None:
            at = to_device([position], x.device)
            neurons = [
                acts.neuron_change(i, at, own[None])[0] for i, own in zip(ids, neurons, strict=True)
            ]
        activations = [weight * own for weight, own in zip(weights, neurons, strict=True)]
        ff2 = torch.cat([expert.ff2 for expert in experts])
        widths = [len(expert.ff2) for expert in experts]
        terms = WeightedRows(
            activations=torch.cat(activations),
            rows=ff2,
            norms=ff2.norm(dim=1),
            bias=self._bias(experts, weights),
            experts=np.repeat(ids, widths),
            neurons=np.concatenate([np.arange(n) for n in widths]),
        )
        ff1 = torch.cat([expert.ff1 for expert in experts], dim=1)
        ups = [expert.up for expert in experts if expert.up is not None]
        return MlpRow(terms, ff1, torch.cat(ups, dim=1) if ups else None)

    def _bias(self, experts: list[Expert], weights: torch.Tensor) -> torch.Tensor | None:
        biases = [
            weight * expert.ff2_bias
            for expert, weight in zip(experts, weights, strict=True)
            if expert.ff2_bias is not None
        ]
        biases += [] if self.bias is None else [self.bias]
        return torch.stack(biases).sum(0) if biases else None


MLP_KINDS = RowKinds(NodeKind.MLP_VALUE, NodeKind.MLP_BIAS)
# Kinds of the nodes inside an MLP.
IN_MLP = frozenset({*MLP_KINDS, NodeKind.MLP_KEY, NodeKind.MLP_UP, NodeKind.OTHER})


def add_mlp(
    flow: FlowBuilder,
    mlp_input: str,
    acts: LayerActivations,
    weights: MlpWeights,
    selection: Selection,
    result: Result,
) -> str:
    """Add the nodes between the MLP's input and its raw result; return the result's id."""
    if not flow.shows(*IN_MLP):
        return flow.node(result.kind, result.vector)
    row = weights.row(acts, flow.position)
    replaced = "MLP_OUTPUT" in acts.replaced
    named = selection.neurons_of(flow.layer)
    numbers = None if named is None else _rows_of(named, row.terms)
    added = add_weighted_rows(
        flow, row.terms, MLP_KINDS, selection, result, replaced=replaced, numbers=numbers
    )
    fired = row.terms.activations[added.neurons.picked]
    _add_keys(flow, NodeKind.MLP_KEY, mlp_input, row.ff1, fired, added.neurons)
    if row.up is not None:
        _add_keys(flow, NodeKind.MLP_UP, mlp_input, row.up, fired, added.neurons)
    return added.total


def _rows_of(named: list[Unit], terms: WeightedRows) -> list[int]:
    """Return the indices of neurons; those of experts that were not routed have none."""
    numbers = [unit.number for unit in named]
    if terms.experts is None or terms.neurons is None:
        return numbers
    experts = np.array([unit.expert or 0 for unit in named], np.int64)
    same = (terms.experts == experts[:, None]) & (terms.neurons == np.array(numbers)[:, None])
    rows: list[int] = np.nonzero(same)[1].tolist()
    return rows


def _add_keys(
    flow: FlowBuilder,
    kind: NodeKind,
    mlp_input: str,
    columns: torch.Tensor,
    fired: torch.Tensor,
    neurons: Neurons,
) -> None:
    """Add the selected `columns` `[d_model, n]` of FF1, gate or up, with edges to their values."""
    if not flow.shows(kind):
        return
    nodes = neuron_nodes(flow, kind, neurons.numbers, neurons.experts)
    keys = flow.nodes([nodes], columns[:, neurons.picked].T, activations=fired)
    flow.edges(EdgeKind.ACTIVATE, [mlp_input] * len(keys), keys, fired)
    flow.edges(EdgeKind.ACTIVATE, keys, neurons.ids, fired)

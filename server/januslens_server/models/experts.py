"""The experts of an MLP: their matrices, captured routing, gradients and edits.

transformers stores the experts of a layer in 3-D parameters instead of linear modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from januslens_server.capture import End, LowRank, Tap
from januslens_server.capture.hooks import Columns, nth_tensor, select
from januslens_server.graph.mlp import Expert, ExpertMlp
from januslens_server.graph.weights import Finish
from januslens_server.models.matrices import Factors, read_parameter, read_tensor
from januslens_server.results import MatrixKind


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in transformers' layout.

    `block` is the whole MLP. `module` has the parameters `gate_up_proj` and `down_proj`
    `[n_experts, ...]`; its arguments are the hidden states `[pos, d_model]`, the experts `[pos, k]`
    and their weights `[pos, k]`. `gate` and `up` are column ranges of the fused projection.
    `router` returns the router's logits first. `stored_as_rows`, `finish` and `added` are as in
    `Linear` and `Mlp`.
    """

    block: nn.Module
    module: nn.Module
    router: nn.Module
    stored_as_rows: bool
    gate: Columns
    up: Columns
    activation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    finish: Finish | None = None
    added: Tap | None = None

    @property
    def input(self) -> Tap:
        """Tap of the MLP's input `[batch, pos, d_model]`."""
        return Tap(self.block, End.INPUT)

    @property
    def output(self) -> Tap:
        """Tap of the weighted sum of the experts' results `[batch, pos, d_model]`."""
        return Tap(self.block, End.OUTPUT)

    @property
    def expert_ids(self) -> Tap:
        """Tap of the experts `[pos, k]` that each position is routed to."""
        return Tap(self.module, End.INPUT, argument=1)

    @property
    def expert_weights(self) -> Tap:
        """Tap of the router's weights `[pos, k]` of their results."""
        return Tap(self.module, End.INPUT, argument=2)

    @property
    def taps(self) -> dict[str, Tap]:
        """Taps that a forward pass captures, by field name of `LayerActivations`."""
        return {
            "mlp_input": self.input,
            "mlp_sum": self.output,
            "expert_ids": self.expert_ids,
            "expert_weights": self.expert_weights,
        }

    @property
    def matrices(self) -> dict[MatrixKind, ExpertMatrices]:
        """Weight matrices by kind, each for all experts."""
        kinds = (MatrixKind.GATE, MatrixKind.UP, MatrixKind.FF2)
        return {kind: ExpertMatrices(self, kind) for kind in kinds}

    def mlp(self) -> ExpertMlp:
        """The experts in the form that the flow graph reads."""
        return ExpertMlp(self.expert, self.activation, self.finish)

    def expert(self, index: int) -> Expert:
        """One expert's weights in float32."""
        matrices = self.matrices
        gate, up, down = (matrices[kind] for kind in matrices)
        return Expert(
            gate=gate.weight_of(index).float(),
            gate_bias=gate.bias_of(index),
            up=up.weight_of(index).float(),
            up_bias=up.bias_of(index),
            down=down.weight_of(index).float(),
            down_bias=down.bias_of(index),
        )


@dataclass(frozen=True)
class ExpertMatrices:
    """One kind of matrix for all experts of a layer."""

    experts: Experts
    kind: MatrixKind

    @property
    def whole(self) -> Tap:
        """Tap of the MLP's output; the factors are computed from its VJPs."""
        return self.experts.output

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Taps that `factors` needs."""
        experts = self.experts
        return (experts.input, experts.output, experts.expert_ids, experts.expert_weights)

    @property
    def module(self) -> nn.Module:
        """The module that contains the matrices."""
        return self.experts.module

    def number(self, expert: int | None) -> int:
        """Return the expert of a `MatrixKey`. Raises `ValueError` if it is None."""
        if expert is None:
            raise ValueError("the expert's number is missing")
        return expert

    def parameter(self) -> torch.Tensor:
        """The model's parameter `[n_experts, ...]` that contains the matrices."""
        return read_parameter(self.module, self._name)

    def rows_of(self, stored: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """One expert's `[d_in, d_out]` in a tensor with the parameter's layout."""
        own = stored[self.number(expert)]
        return select(own if self.experts.stored_as_rows else own.T, self._columns)

    def weight_of(self, expert: int) -> torch.Tensor:
        """`W: [d_in, d_out]` of one expert, a view of the model's parameter."""
        return self.rows_of(self.parameter(), expert)

    def bias_of(self, expert: int) -> torch.Tensor | None:
        """`b: [d_out]` of one expert in float32, or None."""
        bias = read_tensor(self.module, f"{self._name}_bias")
        return None if bias is None else select(bias[expert], self._columns).float()

    def factors(
        self, captured: Mapping[Tap, torch.Tensor], vjps: torch.Tensor
    ) -> dict[int | None, Factors]:
        """Factors by routed expert, from dL/d(MLP output) `[pos, d_model]`.

        The VJPs contain the router's weight, the inputs do not (docs/semantics.md).
        """
        x = captured[self.experts.input][0].detach()
        ids = captured[self.experts.expert_ids].detach()
        weights = captured[self.experts.expert_weights].detach().float()
        return {
            expert: self._factors(expert, x, vjps, ids == expert, weights)
            for expert in sorted(set(ids.flatten().tolist()))
        }

    def _factors(
        self,
        index: int,
        x: torch.Tensor,
        vjps: torch.Tensor,
        routed: torch.Tensor,
        weights: torch.Tensor,
    ) -> Factors:
        """Run one expert again, forward and backward, where it was `routed` `[pos, k]`."""
        positions, slots = torch.where(routed)
        expert = self.experts.expert(index)
        own, delta = x[positions], vjps[positions] * weights[positions, slots, None]
        with torch.enable_grad():
            gate, up = (v.detach().requires_grad_() for v in expert.gate_and_up(own.float()))
            neurons = self.experts.activation(gate, up)
            through_down = delta @ expert.down.T
            gate_vjps, up_vjps = torch.autograd.grad(neurons, (gate, up), through_down)
        if self.kind is MatrixKind.FF2:
            return Factors(neurons.detach(), delta, positions)
        return Factors(own, gate_vjps if self.kind is MatrixKind.GATE else up_vjps, positions)

    @property
    def _name(self) -> str:
        return "down_proj" if self.kind is MatrixKind.FF2 else "gate_up_proj"

    @property
    def _columns(self) -> Columns | None:
        if self.kind is MatrixKind.FF2:
            return None
        return self.experts.gate if self.kind is MatrixKind.GATE else self.experts.up


# Changes of matrices by expert and kind.
ExpertChanges = dict[int, dict[MatrixKind, LowRank]]


@dataclass(frozen=True)
class ExpertOverlay:
    """Overlay that changes matrices of some experts of one MLP.

    An expert is not linear in its gate. What a change adds to its result is therefore the
    difference of two runs, on the positions that are routed to it.
    """

    experts: Experts
    changes: ExpertChanges

    @property
    def module(self) -> nn.Module:
        """The module that contains all experts of the MLP."""
        return self.experts.module

    def over(self, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the experts' results `[pos, d_model]` with the changes applied."""
        x, ids, weights = (nth_tensor(args, n=n) for n in range(3))
        added = torch.zeros(output.shape, device=output.device)
        for index, changes in self.changes.items():
            positions, slots = torch.where(ids == index)
            if len(positions):
                moved = self._moved(index, changes, x[positions].float())
                added.index_add_(0, positions, weights[positions, slots, None].float() * moved)
        return output + added.to(output.dtype)

    def _moved(
        self, index: int, changes: Mapping[MatrixKind, LowRank], x: torch.Tensor
    ) -> torch.Tensor:
        """Difference that the changes make to one expert's result for `x` `[n, d_model]`."""
        expert, activation = self.experts.expert(index), self.experts.activation
        gate, up = expert.gate_and_up(x)
        before = activation(gate, up)
        if MatrixKind.GATE in changes:
            gate = gate + changes[MatrixKind.GATE].times(x)
        if MatrixKind.UP in changes:
            up = up + changes[MatrixKind.UP].times(x)
        after = activation(gate, up)
        moved = (after - before) @ expert.down
        if MatrixKind.FF2 in changes:
            moved = moved + changes[MatrixKind.FF2].times(after)
        return moved

"""Changes of a model's matrices as overlays of the modules that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from januslens_server.capture import LinearOverlay, LowRank, Overlay
from januslens_server.capture.taps import nth_tensor
from januslens_server.models.experts import ExpertMatrices, Experts
from januslens_server.models.factors import MatrixKey
from januslens_server.models.views import ModelView
from januslens_server.results import MatrixKind

# Of some experts' matrices, by expert and kind.
ExpertChanges = dict[int, dict[MatrixKind, LowRank]]


def overlays_of(view: ModelView, changes: Mapping[MatrixKey, LowRank]) -> list[Overlay]:
    """One overlay a linear map, and one for all the changed experts of a layer."""
    overlays: list[Overlay] = []
    of_experts: dict[int, ExpertChanges] = {}
    for (layer, kind, expert), change in changes.items():
        matrix = view.blocks[layer].matrices[kind]
        if isinstance(matrix, ExpertMatrices):
            own = of_experts.setdefault(layer, {}).setdefault(matrix.number(expert), {})
            own[kind] = change
        else:
            overlays.append(LinearOverlay(matrix.module, matrix.columns, change))
    for layer, expert_changes in of_experts.items():
        mlp = view.blocks[layer].mlp
        if isinstance(mlp, Experts):
            overlays.append(ExpertOverlay(mlp, expert_changes))
    return overlays


@dataclass(frozen=True)
class ExpertOverlay:
    """Changes of the matrices of some experts of one MLP.

    An expert is not linear in its gate, so what a change adds to its result is taken as the
    difference of two runs of it, on just the positions that were sent to it.
    """

    experts: Experts
    changes: ExpertChanges

    @property
    def module(self) -> nn.Module:
        """The module that holds all experts of the MLP."""
        return self.experts.module

    def over(self, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the experts' results `[pos, d_model]`, some of them changed."""
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
        """By how much one expert's result for `x` `[n, d_model]` moves."""
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

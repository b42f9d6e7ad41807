"""An MLP that every position passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.terms import WeightedRows
from januslens_server.graph.weights import Finish, MlpRow


@dataclass(frozen=True)
class DenseMlp:
    """`ff1` (gated: the gate) and `up` `[d_model, d_mlp]`, `ff2` `[d_mlp, d_model]`, its norms."""

    ff1: torch.Tensor
    up: torch.Tensor | None
    ff2: torch.Tensor
    bias: torch.Tensor | None
    row_norms: torch.Tensor
    finish: Finish | None

    def row(self, acts: LayerActivations, position: int) -> MlpRow:
        """The captured activations with the rows that they multiply."""
        if acts.neurons is None:
            raise ValueError("expected captured neurons of a dense MLP, got none")
        activations = acts.neurons[acts.row(position)].float()
        terms = WeightedRows(activations, self.ff2, self.row_norms, self.bias)
        return MlpRow(terms, self.ff1, self.up)

"""The factors of one matrix's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from januslens_server.results import MatrixKind

# Layer, kind, and the expert whose matrix it is (None: the layer's only one).
MatrixKey = tuple[int, MatrixKind, int | None]


@dataclass(frozen=True)
class Factors:
    """Inputs `[n, d_in]` and VJPs `[n, d_out]` at `positions` `[n]`: dL/dW = inputs^T vjps.

    Inputs come in the model's data type, VJPs in float32, converted from the model's. An expert
    has a row for each position that was sent to it.
    """

    inputs: torch.Tensor
    vjps: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device) -> Factors:
        """The same factors where the lens reads them."""
        return Factors(self.inputs.to(device), self.vjps.to(device), self.positions.to(device))

"""The terms of a sum of weight rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightedRows:
    """`activations` `[n]`, the `rows` `[n, d_model]` they multiply with their norms `[n]`, a bias.

    `experts` `[n]` and `neurons` `[n]` say which expert's which neuron a row is; None: the rows
    are those of the layer's one matrix.
    """

    activations: torch.Tensor
    rows: torch.Tensor
    norms: torch.Tensor
    bias: torch.Tensor | None
    experts: torch.Tensor | None = None
    neurons: torch.Tensor | None = None

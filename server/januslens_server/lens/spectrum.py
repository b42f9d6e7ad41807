"""Singular values and vectors of a factorised gradient, without forming it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SingularTriples:
    """`values` `[r]`, largest first, with `inputs` `[r, d_in]` and `vjps` `[r, d_out]`.

    `explained` `[r]` is each value's square as a part of the squared Frobenius norm. The signs
    are such that the input side points where the prompt's inputs do on the whole: then the VJP
    side reads as the VJPs do, what a descent step promotes at the bottom.
    """

    values: torch.Tensor
    explained: torch.Tensor
    inputs: torch.Tensor
    vjps: torch.Tensor


def spectrum(inputs: torch.Tensor, vjps: torch.Tensor, rank: int) -> SingularTriples:
    """The `rank` largest singular triples of `sum_i x_i^T delta_i`, exact, in float64.

    `inputs` `[n, d_in]`, `vjps` `[n, d_out]`. With thin QRs `X^T = Q_x R_x`, `D^T = Q_d R_d` the
    gradient is `Q_x (R_x R_d^T) Q_d^T`: only the small middle matrix is decomposed.
    """
    input_basis, input_mix = torch.linalg.qr(inputs.double().T)
    vjp_basis, vjp_mix = torch.linalg.qr(vjps.double().T)
    left, values, right = torch.linalg.svd(input_mix @ vjp_mix.T, full_matrices=False)
    total = values.square().sum()
    count = min(rank, len(values))
    input_side = (input_basis @ left[:, :count]).T
    vjp_side = (vjp_basis @ right[:count].T).T
    signs = torch.where(input_side @ inputs.double().sum(0) < 0, -1.0, 1.0)[:, None]
    return SingularTriples(
        values=values[:count],
        explained=values[:count].square() / total if total > 0 else torch.zeros(count),
        inputs=input_side * signs,
        vjps=vjp_side * signs,
    )

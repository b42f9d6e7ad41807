"""What a descent step does to single neurons (Backward Lens, section 5: imprint and shift)."""

from __future__ import annotations

import torch


def change_norms(outside: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """||sum_i outside_i[j] residual_i|| for every neuron j `[d_mlp]`, in float64.

    `residual` `[n, d_model]` are the factors in the residual basis, `outside` `[n, d_mlp]` those
    over neurons: FF1's column j moves along its inputs by its VJPs, FF2's row j along its VJPs
    by its inputs. From the Gram matrix: nothing of the weight's size is formed.
    """
    outside, residual = outside.double(), residual.double()
    if len(residual) > residual.shape[1]:  # then the changes take less than the Gram matrix
        norms: torch.Tensor = (outside.T @ residual).norm(dim=1)
        return norms
    squared = ((residual @ residual.T @ outside) * outside).sum(0)
    return squared.clamp_min(0).sqrt()


def descent_changes(
    outside: torch.Tensor, residual: torch.Tensor, neurons: torch.Tensor, learning_rate: float
) -> torch.Tensor:
    """`-learning_rate sum_i outside_i[j] residual_i` `[k, d_model]` for the neurons j `[k]`."""
    return -learning_rate * (outside[:, neurons].T @ residual)

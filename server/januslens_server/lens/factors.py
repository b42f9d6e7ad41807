"""A weight gradient as a sum of outer products (Backward Lens, section 4.1, eq. 8).

`dL/dW = sum_i x_i^T delta_i` over positions i: x_i what the map took, delta_i the VJP at what it
gave. Nothing here forms the `[d_in, d_out]` matrix.
"""

from __future__ import annotations

import torch


def sizes(inputs: torch.Tensor, vjps: torch.Tensor) -> torch.Tensor:
    """||x_i|| ||delta_i|| `[n]`: the norm of each component's outer product, in float64."""
    return lengths(inputs) * lengths(vjps)


def lengths(vectors: torch.Tensor) -> torch.Tensor:
    """The norm of each row, in float64: gradients of a confident model vanish when squared."""
    norms: torch.Tensor = vectors.double().norm(dim=-1)
    return norms


def largest_first(inputs: torch.Tensor, vjps: torch.Tensor, count: int) -> torch.Tensor:
    """Positions `[k]` of the components by size, the lower position first among equals; 0: all."""
    order = sizes(inputs, vjps).sort(descending=True, stable=True).indices
    return order[:count] if count else order


def frobenius_norm(inputs: torch.Tensor, vjps: torch.Tensor) -> float:
    """||sum_i x_i^T delta_i||_F in float64.

    From the two Gram matrices, or for more components than it has rows and columns from the sum.
    """
    x, delta = inputs.double(), vjps.double()
    (count, d_in), d_out = x.shape, delta.shape[1]
    if count * (d_in + d_out) > d_in * d_out:
        return float((x.T @ delta).norm())
    squared = ((x @ x.T) * (delta @ delta.T)).sum()
    return float(squared.clamp_min(0).sqrt())


def largest_entries(vectors: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values `[n, count]` of each row's largest entries by absolute value."""
    order = vectors.abs().sort(dim=-1, descending=True, stable=True).indices[:, :count]
    order = order.clone()  # a view would keep all of the order in memory
    return order, vectors.gather(1, order)


def reconstruction_error(inputs: torch.Tensor, vjps: torch.Tensor, dense: torch.Tensor) -> float:
    """`||sum_i x_i^T delta_i - dense||_F / ||dense||_F`; 0 where both are zero."""
    dense = dense.float()
    difference = (inputs.float().T @ vjps.float() - dense).norm()
    size = dense.norm()
    return float(difference / size) if size > 0 else float(difference)

"""Which parts of a sum become nodes (VISIT, section 3, appendix A.5); the rest goes into OTHER.

Stable sorts, so that among equal scores the lower index wins.
"""

from __future__ import annotations

import torch


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `[..., count]` of the largest `scores` `[..., n]`, largest first; 0 means all."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count] if count else order


def extremes(scores: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
    """Indices of the `top` largest, then the `bottom` smallest `scores` `[n]`, without repeats.

    `top` 0 means all; `bottom` 0 means none.
    """
    highest = largest(scores, top)
    lowest = scores.sort(stable=True).indices[:bottom]
    return torch.cat([highest, lowest[~torch.isin(lowest, highest)]])


def left_out(size: int, picked: torch.Tensor) -> torch.Tensor:
    """Mask `[..., size]`, True where an index is not among `picked` `[..., k]`."""
    mask = torch.ones(*picked.shape[:-1], size, dtype=torch.bool, device=picked.device)
    return mask.scatter_(-1, picked, value=False)

"""Attention probabilities recomputed from captured queries and keys.

Only the query rows that are asked for are computed, so the model itself may run any attention
kernel; that these rows equal eager attention's is tested.
"""

from __future__ import annotations

import torch


def attention_row(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Probabilities `[n_heads, sources]` with which one position attends to its sources.

    `query` `[n_heads, d_head]`; `keys` `[n_heads, sources, d_head]`, the sources up to and
    including the position itself, so that no mask is needed.
    """
    scores = torch.einsum("he,hse->hs", query, keys) * scale
    return scores.softmax(dim=-1)

"""Attention probabilities recomputed from captured queries and keys.

Only the query rows that are asked for are computed, so the model itself may run any attention
kernel; that these rows equal eager attention's is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scoring:
    """How a layer makes probabilities of dot products.

    `scale` multiplies q k^T, then `soft_cap` bounds it: `cap * tanh(score / cap)`. `alibi` gives
    what is added for a number of sources, `[n_heads, sources]`, as the model itself computes it:
    some round it to half precision, by more than a position. `sinks` `[n_heads]` are scores that
    take probability without giving a value. A layer with a `window` sees that many positions, its
    own included.
    """

    scale: float
    soft_cap: float | None = None
    alibi: Callable[[int], torch.Tensor] | None = None
    sinks: torch.Tensor | None = None
    window: int | None = None

    def first_source(self, position: int) -> int:
        """The first position that `position` attends to."""
        return 0 if self.window is None else max(0, position + 1 - self.window)


def attention_row(query: torch.Tensor, keys: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Probabilities `[n_heads, sources]` with which one position attends to its sources.

    `query` `[n_heads, d_head]`; `keys` `[n_heads, sources, d_head]`, the sources up to and
    including the position itself, so that no mask is needed.
    """
    scores = torch.einsum("he,hse->hs", query, keys) * scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    if scoring.alibi is not None:
        scores = scores + scoring.alibi(keys.shape[1]).to(scores)
    if scoring.sinks is None:
        return scores.softmax(dim=-1)
    with_sinks = torch.cat([scores, scoring.sinks[:, None].float()], dim=-1)
    return with_sinks.softmax(dim=-1)[:, :-1]

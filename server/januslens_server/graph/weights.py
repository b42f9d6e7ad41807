"""The weights of one block that the flow graph reads, as plain float32 tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionWeights:
    """Per-head maps, row convention.

    `query` `[n_heads, d_model, d_head]`, `key` `[n_kv_heads, d_model, d_head]`, `output`
    `[n_heads, d_head, d_model]`, `bias` `[d_model]` or None, `row_norms` `[n_heads * d_head]`
    of the rows of W_O. `scale` multiplies q k^T; `window` is how many positions
    are attended to, None: all.
    """

    query: torch.Tensor
    key: torch.Tensor
    output: torch.Tensor
    bias: torch.Tensor | None
    row_norms: torch.Tensor
    scale: float
    window: int | None


@dataclass(frozen=True)
class MlpWeights:
    """`ff1` (gated: the gate) and `up` `[d_model, d_mlp]`, `ff2` `[d_mlp, d_model]`, its norms."""

    ff1: torch.Tensor
    up: torch.Tensor | None
    ff2: torch.Tensor
    bias: torch.Tensor | None
    row_norms: torch.Tensor


@dataclass(frozen=True)
class BlockWeights:
    """Attention and MLP of one block."""

    attention: AttentionWeights
    mlp: MlpWeights

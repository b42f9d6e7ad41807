"""What is captured of one block in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from januslens_server.capture.rotation import Rotation


@dataclass(frozen=True)
class LayerActivations:
    """The tensors of one block, as the model computed them, without the batch dimension.

    `query` is `[pos, n_heads, d_head]`, `key` and `value` `[pos, n_kv_heads, d_head]`: what the
    linear maps give, before norms, clipping and `rotation`. `attention_concat` is
    `[pos, n_heads * d_head]`, `neurons` (what multiplies FF2's rows) `[pos, d_mlp]`, all others
    `[pos, d_model]`. `attention_output` and `mlp_output` are what is added to the residual, the
    sums what they are made of where a post-norm or multiplier stands between. A parallel block
    has no `residual_mid`.
    """

    block_input: torch.Tensor
    attention_input: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_concat: torch.Tensor
    attention_output: torch.Tensor
    residual_mid: torch.Tensor | None
    mlp_input: torch.Tensor
    neurons: torch.Tensor
    mlp_output: torch.Tensor
    block_output: torch.Tensor
    rotation: Rotation | None
    attention_sum: torch.Tensor | None
    mlp_sum: torch.Tensor | None

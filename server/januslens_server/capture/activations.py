"""What is captured of one block in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from januslens_server.capture.rotation import Rotation


@dataclass(frozen=True)
class Routing:
    """The `experts` `[pos, k]` each position was sent to, and the `weights` of their results."""

    experts: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class LayerActivations:
    """The tensors of one block, as the model computed them, without the batch dimension.

    `kept` maps a position of the prompt to its row in every tensor but `key` and `value`, which
    have a row for each position; None: all tensors have.

    `query` is `[pos, n_heads, d_head]`, `key` and `value` `[pos, n_kv_heads, d_head]`: what the
    linear maps give, before norms, clipping and `rotation`. `attention_concat` is
    `[pos, n_heads * d_head]`, `neurons` (what multiplies FF2's rows) `[pos, d_mlp]`, all others
    `[pos, d_model]`. `attention_output` and `mlp_output` are what is added to the residual, the
    sums what they are made of where a post-norm or multiplier stands between. A parallel block
    has no `residual_mid`, a mixture of experts `routing` instead of `neurons`.
    """

    block_input: torch.Tensor
    attention_input: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_concat: torch.Tensor
    attention_output: torch.Tensor
    mlp_input: torch.Tensor
    mlp_output: torch.Tensor
    block_output: torch.Tensor
    rotation: Rotation | None
    routing: Routing | None
    neurons: torch.Tensor | None = None
    residual_mid: torch.Tensor | None = None
    attention_sum: torch.Tensor | None = None
    mlp_sum: torch.Tensor | None = None
    kept: Mapping[int, int] | None = None

    def row(self, position: int) -> int:
        """Where a position's activations are: an index into all tensors but `key` and `value`."""
        return position if self.kept is None else self.kept[position]

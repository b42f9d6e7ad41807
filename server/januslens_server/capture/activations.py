"""What one forward pass computed in one block, and how its positions rotate queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


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


@dataclass(frozen=True)
class Rotation:
    """The matrices M_p that turn queries and keys at position p (row convention: `q M_p`).

    `cos` and `sin` are `[pos, rotary]`, each value standing at both members of its pair, as the
    model computed them; the first `rotary` of a head's dimensions turn. Pairs are neighbours
    if `interleaved` (GPT-J), else half a rotary width apart (Llama).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def to(self, device: torch.device) -> Rotation:
        """The same rotation where a block computes."""
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device))

    def turn(self, vectors: torch.Tensor, positions: slice) -> torch.Tensor:
        """`v M_p` for `[..., len(positions), d_head]`, each at its own position."""
        return self._turned(vectors, self.cos[positions].float(), self.sin[positions].float())

    def turn_back(self, vectors: torch.Tensor, position: int) -> torch.Tensor:
        """`v M_p^T` for `[..., d_head]`, all at one position.

        The transpose and not the inverse: some scalings make M a multiple of a rotation.
        """
        return self._turned(vectors, self.cos[position].float(), -self.sin[position].float())

    def _turned(self, vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turning, rest = vectors[..., : cos.shape[-1]], vectors[..., cos.shape[-1] :]
        return torch.cat([turning * cos + self._quarter(turning) * sin, rest], dim=-1)

    def _quarter(self, vectors: torch.Tensor) -> torch.Tensor:
        """Each pair (a, b) turned by 90 degrees: (-b, a). Its transpose is its negative."""
        if self.interleaved:
            pairs = vectors.unflatten(-1, (-1, 2))
            return torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        first, second = vectors.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

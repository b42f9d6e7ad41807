"""The two norms of causal language models as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Norm:
    """LayerNorm (`centred`) or RMSNorm with its learned numbers.

    `weight` and `bias` are `[d_model]`, in float32; `weight` is what the normalised vector is
    multiplied by (families that store `weight - 1` add the one in their adapter).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centred: bool

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Normalised `[..., d_model]`, computed in float32."""
        vectors = vectors.float()
        if self.centred:
            return torch.nn.functional.layer_norm(
                vectors, self.weight.shape, self.weight, self.bias, self.eps
            )
        return vectors * self.inverse_scale(vectors) * self.weight

    def inverse_scale(self, at: torch.Tensor) -> torch.Tensor:
        """1 / the denominator `[..., 1]` that the norm divides `at: [..., d_model]` by."""
        at = at.float()
        variance = (
            at.var(-1, unbiased=False, keepdim=True)
            if self.centred
            else at.square().mean(-1, keepdim=True)
        )
        return torch.rsqrt(variance + self.eps)

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """J^T direction, J the norm's linear part at `at` with its scale held fixed.

        Shapes `[..., d_model]`. For every part x of `at`: `<J x, direction>` is
        `<x, pull_back(direction)>`.
        """
        pulled = direction.float() * self.weight * self.inverse_scale(at)
        if self.centred:
            pulled = pulled - pulled.mean(-1, keepdim=True)
        return pulled

"""LayerNorm and RMSNorm, and their linear part with the scale fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Norm:
    """LayerNorm (`centred`) or RMSNorm, with its learned parameters.

    `weight` and `bias` are `[d_model]`, in float32. The normalised vector is multiplied by
    `weight`; for families that store `weight - 1`, the adapter adds the 1.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centred: bool

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the normalised vectors `[..., d_model]`, computed in float32."""
        vectors = vectors.float()
        if self.centred:
            return torch.nn.functional.layer_norm(
                vectors, self.weight.shape, self.weight, self.bias, self.eps
            )
        return vectors * self.inverse_scale(vectors) * self.weight

    def inverse_scale(self, at: torch.Tensor) -> torch.Tensor:
        """Return 1 / the norm's denominator `[..., 1]` for vectors `at` `[..., d_model]`."""
        at = at.float()
        variance = (
            at.var(-1, unbiased=False, keepdim=True)
            if self.centred
            else at.square().mean(-1, keepdim=True)
        )
        return torch.rsqrt(variance + self.eps)

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return J^T direction, where J is the norm's linear part with its scale fixed at `at`.

        All shapes are `[..., d_model]`. For every part x of `at`, `<J x, direction>` equals
        `<x, pull_back(direction)>`.
        """
        pulled = direction.float() * self.weight * self.inverse_scale(at)
        if self.centred:
            pulled = pulled - pulled.mean(-1, keepdim=True)
        return pulled


@dataclass(frozen=True)
class NoNorm(Norm):
    """The identity, for models whose head reads the last block's output itself."""

    @classmethod
    def of_width(cls, width: int, device: torch.device) -> NoNorm:
        """Return the identity on vectors `[..., width]`."""
        return cls(torch.ones(width, device=device), None, eps=0.0, centred=False)

    def inverse_scale(self, at: torch.Tensor) -> torch.Tensor:
        """Return ones `[..., 1]`."""
        return torch.ones_like(at[..., :1], dtype=torch.float32)

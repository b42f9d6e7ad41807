"""What some families do to queries and keys between their linear maps and the rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries or keys.

    `weight` and `bias` are `[d_head]` (the same for every head) or `[heads, d_head]`. The
    denominator is each head's own, or one for all heads together (`spans_heads`, OLMo 2).
    """

    weight: torch.Tensor
    eps: float
    centred: bool = False
    spans_heads: bool = False
    bias: torch.Tensor | None = None

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Normalised `[pos, heads, d_head]`."""
        scaled = self._centre(vectors) * self.inverse_scale(vectors) * self.weight
        return scaled if self.bias is None else scaled + self.bias

    def inverse_scale(self, at: torch.Tensor) -> torch.Tensor:
        """1 / the denominator, `[..., heads or 1, 1]`, of `at` `[..., heads, d_head]`."""
        dims = (-2, -1) if self.spans_heads else (-1,)
        variance = self._centre(at).square().mean(dims, keepdim=True)
        return torch.rsqrt(variance + self.eps)

    def pull_back(self, directions: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """J^T direction with the scale fixed; both `[..., heads, d_head]`, one direction a head."""
        return self._centre(directions * self.weight * self.inverse_scale(at))

    def _centre(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors


@dataclass(frozen=True)
class HeadMap:
    """Clipping to `[-clip, clip]`, a norm, clipping to `clip_after`; None: not there."""

    clip: float | None = None
    norm: HeadNorm | None = None
    clip_after: float | None = None

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Queries or keys `[pos, heads, d_head]` as they are rotated."""
        return _clipped(self._normed(_clipped(vectors, self.clip)), self.clip_after)

    def pull_back(self, directions: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """J^T direction, J the map's linear part at `at`; both `[..., heads, d_head]`.

        The norm's scale is fixed; coordinates that were clipped no longer depend on the input.
        """
        inside = _clipped(at, self.clip)
        directions = _without_clipped(directions, self._normed(inside), self.clip_after)
        if self.norm is not None:
            directions = self.norm.pull_back(directions, inside)
        return _without_clipped(directions, at, self.clip)

    def _normed(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self.norm is None else self.norm(vectors)


def _clipped(vectors: torch.Tensor, clip: float | None) -> torch.Tensor:
    return vectors if clip is None else vectors.clamp(-clip, clip)


def _without_clipped(
    directions: torch.Tensor, at: torch.Tensor, clip: float | None
) -> torch.Tensor:
    return directions if clip is None else torch.where(at.abs() < clip, directions, 0.0)

"""Rotary position embedding as the linear map it is, for one prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


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

"""How a model turns the residual stream into the vector that its final norm reads.

Most models need nothing: their final norm reads the last block's output. Models with several
residual streams merge them, and some heads have a hidden layer. Each merge is a map whose
coefficients depend on its input. With these coefficients fixed, it is linear, which divides a logit
among the parts of the residual stream as the fixed scale of a norm does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from januslens_server.lens.norm import Norm

# Lower bound of the mean square of a stream that Gemma 3n scales.
SMALLEST_SQUARE = 1e-5


class Merge(ABC):
    """A map from the residual stream `[..., streams * d_model]` to vectors `[..., d_model]`."""

    @property
    @abstractmethod
    def streams(self) -> int:
        """The number of residual streams, whose vectors stand side by side."""

    @abstractmethod
    def __call__(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the merged vectors, computed in float32."""

    @abstractmethod
    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return L^T direction, where L is the map with its coefficients fixed at `at`.

        For every part x of `at`, `<L x, direction>` equals `<x, pull_back(direction)>`.
        """

    def constant(self, at: torch.Tensor) -> torch.Tensor | None:
        """Return what the map's biases add to the result at `at`; None without biases."""
        del at
        return None

    def divided(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the streams `[..., streams, d_model]` in float32."""
        streams: torch.Tensor = residual.float().unflatten(-1, (self.streams, -1))
        return streams


class ScaledSum(Merge):
    """A sum of the streams, each number times a factor that depends on all streams."""

    @abstractmethod
    def factors(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the factors `[..., streams, d_model]`, or `[..., streams, 1]` if equal."""

    def __call__(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the sums."""
        return (self.factors(residual) * self.divided(residual)).sum(-2)

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the direction times each number's factor."""
        return (self.factors(at) * direction.float()[..., None, :]).flatten(-2)


@dataclass(frozen=True)
class WeightedSum(ScaledSum):
    """The head of hyper-connections: a sum whose weights depend on all streams.

    The weights are `sigmoid(scale * (RMSNorm(x) matrix^T) + base) + floor`; `matrix` is
    `[streams, streams * d_model]` (DeepSeek V4, HY V4).
    """

    matrix: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    floor: float
    eps: float

    @property
    def streams(self) -> int:
        """The number of streams."""
        return len(self.matrix)

    def factors(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the weights `[..., streams, 1]`."""
        whole = residual.float()
        whole = whole * torch.rsqrt(whole.square().mean(-1, keepdim=True) + self.eps)
        weights = torch.sigmoid(whole @ self.matrix.T * self.scale + self.base) + self.floor
        return weights[..., None]


@dataclass(frozen=True)
class GatedMean(ScaledSum):
    """The mean of normed streams times gates, which depend on all streams (Qwen 4).

    The gates are `sigmoid(up(silu(down(x) / streams)))`, where x are the streams, each divided by
    its root mean square and times its part of `weight` `[streams, d_model]`. `down` is `[rank,
    streams * d_model]` and `up` its transpose's shape.
    """

    weight: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    eps: float

    @property
    def streams(self) -> int:
        """The number of streams."""
        return len(self.weight)

    def factors(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the factors `[..., streams, d_model]` of the streams' numbers."""
        divided = self.divided(residual)
        scales = torch.rsqrt(divided.square().mean(-1, keepdim=True) + self.eps) * self.weight
        hidden = (divided * scales).flatten(-2) @ self.down.T / self.streams
        gates = torch.sigmoid(torch.nn.functional.silu(hidden) @ self.up.T)
        return self.divided(gates) * scales / self.streams


@dataclass(frozen=True)
class ProjectedMean(Merge):
    """The mean of the first stream and linear maps of the others, all of one length (Gemma 3n).

    `matrices` are `[streams - 1, d_model, d_model]`, in the row convention. Each result is scaled
    to the root mean square of the first stream.
    """

    matrices: torch.Tensor

    @property
    def streams(self) -> int:
        """The number of streams."""
        return len(self.matrices) + 1

    def __call__(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the means."""
        first, mapped, scales = self._mapped(residual)
        return (first + (scales * mapped).sum(-2)) / self.streams

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the direction at the first stream, and scaled and mapped back at the others."""
        _, _, scales = self._mapped(at)
        direction = direction.float()
        others = torch.einsum("...d,ked->...ke", direction, self.matrices) * scales
        return torch.cat([direction[..., None, :], others], dim=-2).flatten(-2) / self.streams

    def _mapped(self, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the first stream, the maps of the others, and their scales `[..., 1]`."""
        divided = self.divided(residual)
        first = divided[..., 0, :]
        mapped = torch.einsum("...ke,ked->...kd", divided[..., 1:, :], self.matrices)
        size = first.square().mean(-1, keepdim=True).sqrt()[..., None, :]
        own = mapped.square().mean(-1, keepdim=True).clamp(min=SMALLEST_SQUARE).sqrt()
        return first, mapped, size / own


@dataclass(frozen=True)
class HiddenLayer(Merge):
    """A final norm and a hidden layer, behind which the head has a norm of its own (ModernBERT).

    `matrix` is `[d_model, d_model]`, in the row convention. The activation is fixed as a factor of
    each hidden number, its result divided by its argument.
    """

    norm: Norm
    matrix: torch.Tensor
    bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor]

    @property
    def streams(self) -> int:
        """One."""
        return 1

    def __call__(self, residual: torch.Tensor) -> torch.Tensor:
        """Return the hidden layer's results."""
        return self.activation(self._hidden(residual))

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the direction through the activation's factors, the matrix and the norm."""
        hidden = direction.float() * self._factors(at)
        return self.norm.pull_back(hidden @ self.matrix.T, at=at)

    def constant(self, at: torch.Tensor) -> torch.Tensor:
        """Return what the biases of norm and matrix add."""
        added = torch.zeros_like(self.matrix[0]) if self.bias is None else self.bias
        if self.norm.bias is not None:
            added = added + self.norm.bias @ self.matrix
        return self._factors(at) * added

    def _hidden(self, residual: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(residual) @ self.matrix
        return hidden if self.bias is None else hidden + self.bias

    def _factors(self, at: torch.Tensor) -> torch.Tensor:
        hidden = self._hidden(at)
        whole = torch.where(hidden == 0, torch.ones_like(hidden), hidden)
        return self.activation(hidden) / whole

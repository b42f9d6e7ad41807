"""The weights of one block that the flow graph reads, as plain float32 tensors.

Attention probabilities are recomputed from captured queries and keys for the requested rows only,
so the model itself may run any attention kernel; a test compares them with eager attention's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from januslens_server.capture import LayerActivations
from januslens_server.lens.head import Norm


@dataclass(frozen=True)
class QueryScaling:
    """Growth of a query's scores with its position p: `1 + beta log(1 + floor(p / length))`.

    Source: Ministral 3, which scales attention beyond its original context of `length` positions.
    """

    beta: float
    length: int

    def at(self, position: int) -> float:
        """Return the factor of the scores at a position."""
        return 1 + self.beta * math.log(1 + position // self.length)


@dataclass(frozen=True)
class Scoring:
    """How a layer makes probabilities of dot products.

    `scale` multiplies q k^T, then `soft_cap` bounds it: `cap * tanh(score / cap)`. `alibi` gives
    what is added for a number of sources, `[n_heads, sources]`, as the model itself computes it:
    some round it to half precision, by more than a position. `sinks` `[n_heads]` are scores that
    take probability without giving a value. A layer with a `window` sees that many positions, its
    own included. `query_scaling` multiplies the query, by its position.
    """

    scale: float
    soft_cap: float | None = None
    alibi: Callable[[int], torch.Tensor] | None = None
    sinks: torch.Tensor | None = None
    window: int | None = None
    query_scaling: QueryScaling | None = None

    def scale_of_query(self, position: int) -> float:
        """Return the factor by which `query_scaling` multiplies the query at a position."""
        return 1.0 if self.query_scaling is None else self.query_scaling.at(position)

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


@dataclass(frozen=True)
class WeightedRows:
    """`activations` `[n]`, the `rows` `[n, d_model]` they multiply with their norms `[n]`, a bias.

    `experts` `[n]` and `neurons` `[n]` say which expert's which neuron a row is; None: the rows
    are those of the layer's one matrix.
    """

    activations: torch.Tensor
    rows: torch.Tensor
    norms: torch.Tensor
    bias: torch.Tensor | None
    experts: torch.Tensor | None = None
    neurons: torch.Tensor | None = None


@dataclass(frozen=True)
class Finish:
    """What stands between a sublayer's raw result and the residual: a post-norm, a multiplier."""

    norm: Norm | None = None
    multiplier: float = 1.0

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """`[d_model]`: a direction after it, as one before it, the norm's scale fixed at `at`."""
        direction = direction * self.multiplier
        return direction if self.norm is None else self.norm.pull_back(direction, at)


@dataclass(frozen=True)
class AttentionWeights:
    """Per-head maps, row convention.

    `query` `[n_heads, d_model, d_head]`, `key` `[n_kv_heads, d_model, d_head]`, `output`
    `[n_heads, d_head, d_model]`, `bias` `[d_model]` or None, `row_norms` `[n_heads * d_head]`
    of the rows of W_O. `finish` None: the raw result is what is added to the residual.
    """

    query: torch.Tensor
    key: torch.Tensor
    output: torch.Tensor
    bias: torch.Tensor | None
    row_norms: torch.Tensor
    scoring: Scoring
    query_map: HeadMap
    key_map: HeadMap
    value_clip: float | None
    finish: Finish | None


@dataclass(frozen=True)
class MlpRow:
    """The MLP at one position: `terms` of its raw result, and the columns before each of them.

    `ff1` (gated: the gate) and `up` are `[d_model, n]` for the n rows of `terms`.
    """

    terms: WeightedRows
    ff1: torch.Tensor
    up: torch.Tensor | None


class MlpWeights(Protocol):
    """An MLP's weights, dense or of experts."""

    @property
    def finish(self) -> Finish | None:
        """None: the raw result is what is added to the residual."""

    def row(self, acts: LayerActivations, position: int) -> MlpRow:
        """The MLP at one position of a prompt."""


@dataclass(frozen=True)
class BlockWeights:
    """Attention and MLP of one block, and whether a norm precedes each."""

    attention: AttentionWeights
    mlp: MlpWeights
    attention_prenorm: bool
    mlp_prenorm: bool

"""The weights of one block as plain float32 tensors, in the form that the flow graph needs.

Attention probabilities are recomputed from captured queries and keys, for the requested positions
only. So the model may use any attention kernel. A test compares them with eager attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from januslens_server.capture import HiddenSources, LayerActivations, Rotation
from januslens_server.lens.norm import Norm
from januslens_server.results import Ints
from januslens_server.transfer import to_device


@dataclass(frozen=True)
class QueryScaling:
    """The factor `1 + beta log(1 + floor((p + offset) / length))` of the scores of a query at p.

    Sources: Ministral 3, which scales attention beyond its original context of `length` positions,
    and Llama 4, which counts positions from an `offset` of 1.
    """

    beta: float
    length: int
    offset: int = 0

    def at(self, position: int) -> float:
        """Return the factor of the scores at a position."""
        return 1 + self.beta * math.log(1 + (position + self.offset) // self.length)


@dataclass(frozen=True)
class Scoring:
    """How a layer computes attention probabilities from dot products.

    `scale` multiplies q k^T; then `soft_cap` bounds the score: `cap * tanh(score / cap)`. `alibi`
    returns the position bias `[n_heads, sources]` for a number of sources. It is rounded as in the
    model: some models round it to half precision, which shifts it by more than a position. `sinks`
    `[n_heads]` are scores that take probability but have no value. In a layer with a `window`, a
    position attends to that many positions, including itself. In a layer with a `chunk` (Llama 4),
    the prompt is cut into chunks of that many positions, and a position attends to its own chunk.
    `query_scaling` multiplies the query by a factor of its position. `query_norm` and `key_norm`
    are RMSNorms without a bias of the rotated queries and keys.
    """

    scale: float
    soft_cap: float | None = None
    alibi: Callable[[int], torch.Tensor] | None = None
    sinks: torch.Tensor | None = None
    window: int | None = None
    chunk: int | None = None
    query_scaling: QueryScaling | None = None
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None

    def scale_of_query(self, position: int) -> float:
        """Return the factor by which `query_scaling` multiplies the query at a position."""
        return 1.0 if self.query_scaling is None else self.query_scaling.at(position)

    def first_source(self, position: int) -> int:
        """Return the first position that `position` attends to."""
        first = 0 if self.window is None else max(0, position + 1 - self.window)
        return first if self.chunk is None else max(first, position - position % self.chunk)


def attention_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    scoring: Scoring,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention probabilities `[n_heads, sources]` of one position.

    `query` is `[n_heads, d_head]`. `keys` `[n_heads, sources, d_head]` end with the key of the
    position itself, so no causal mask is needed. `hidden` `[n_heads, sources]` marks sources that
    an intervention hides.
    """
    scores = torch.einsum("he,hse->hs", query, keys) * scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    if scoring.alibi is not None:
        scores = scores + scoring.alibi(keys.shape[1]).to(scores)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if scoring.sinks is None:
        return scores.softmax(dim=-1)
    with_sinks = torch.cat([scores, scoring.sinks[:, None].float()], dim=-1)
    return with_sinks.softmax(dim=-1)[:, :-1]


def attention_patterns(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: Sequence[int],
    rotation: Rotation | None,
    scoring: Scoring,
    hidden_sources: HiddenSources | None = None,
) -> torch.Tensor:
    """Return the attention probabilities `[pos, n_heads, sources]` of some positions, in float32.

    `query` `[pos, n_heads, d_head]` has a row for each of the `positions`, `key` `[sources,
    n_kv_heads, d_head]` one for each source; both are before rotation.
    """
    scores = _scores(query, key, positions, rotation, scoring)
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    return _probabilities(scores, positions, scoring, hidden_sources)


@dataclass(frozen=True)
class AttentionGradients:
    """Attention probabilities and gradients of some positions, each `[pos, n_heads, sources]`.

    `of_pattern` are the gradients with respect to the probabilities, also of sources that a
    position does not attend to. `of_scores` are those with respect to the scaled products of query
    and key, before a soft cap and a position bias.
    """

    pattern: torch.Tensor
    of_pattern: torch.Tensor
    of_scores: torch.Tensor


def attention_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result_gradient: torch.Tensor,
    positions: Sequence[int],
    rotation: Rotation | None,
    scoring: Scoring,
    hidden_sources: HiddenSources | None = None,
) -> AttentionGradients:
    """Return the attention of some positions and its gradients, in float32.

    The first arguments are those of `attention_patterns`; `value` is `[sources, n_kv_heads,
    d_value]`, and `result_gradient` `[pos, n_heads, d_value]` the gradient of the heads' results z
    = a v. A sink takes probability, but has no value and so no term in the softmax's Jacobian.

    Source: Reversed Attention (Katz & Wolf, 2025), section 3.
    """
    scores = _scores(query, key, positions, rotation, scoring)
    slope = None
    if scoring.soft_cap is not None:
        capped = torch.tanh(scores / scoring.soft_cap)
        scores, slope = scoring.soft_cap * capped, 1 - capped.square()
    pattern = _probabilities(scores, positions, scoring, hidden_sources)
    groups = result_gradient.float().unflatten(1, (value.shape[1], -1))
    of_pattern = torch.einsum("pkge,ske->pkgs", groups, value.float()).flatten(1, 2)
    mean = (pattern * of_pattern).sum(-1, keepdim=True)
    of_scores = pattern * (of_pattern - mean)
    if slope is not None:
        of_scores = of_scores * slope.transpose(0, 1)
    return AttentionGradients(pattern, of_pattern, of_scores)


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: Sequence[int],
    rotation: Rotation | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Return the scaled products of queries and keys `[n_heads, pos, sources]`."""
    queries, keys = query.float().transpose(0, 1), key.float().transpose(0, 1)
    if rotation is not None:
        queries = rotation.turn(queries, to_device(positions, query.device))
        keys = rotation.turn(keys, slice(keys.shape[1]))
    queries = queries if scoring.query_norm is None else scoring.query_norm(queries)
    keys = keys if scoring.key_norm is None else scoring.key_norm(keys)
    if scoring.query_scaling is not None:
        factors = [scoring.scale_of_query(position) for position in positions]
        queries = queries * queries.new_tensor(factors)[:, None]
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    return queries @ keys.transpose(1, 2) * scoring.scale


def _probabilities(
    scores: torch.Tensor,
    positions: Sequence[int],
    scoring: Scoring,
    hidden_sources: HiddenSources | None,
) -> torch.Tensor:
    """Return the probabilities `[pos, n_heads, sources]` of capped scores."""
    n_sources = scores.shape[2]
    at = to_device(positions, scores.device)
    if scoring.alibi is not None:
        scores = scores + scoring.alibi(n_sources).to(scores)[:, None]
    sources = torch.arange(n_sources, device=scores.device)
    hidden = sources > at[:, None]
    if scoring.window is not None:
        hidden |= sources <= at[:, None] - scoring.window
    if scoring.chunk is not None:
        hidden |= sources < (at - at % scoring.chunk)[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    if hidden_sources is not None:
        mask = hidden_sources.mask(positions, len(scores), len(sources), scores.device)
        scores = scores.masked_fill(mask.transpose(0, 1), -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.float()[:, None, None].expand(-1, len(positions), 1)
        scores = torch.cat([scores, sinks.to(scores.device)], dim=-1)
    return scores.softmax(dim=-1)[..., :n_sources].transpose(0, 1)


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries or keys.

    `weight` and `bias` are `[d_head]`, the same for every head, or `[heads, d_head]`. Each head is
    divided by its own denominator, or with `spans_heads` (OLMo 2) by that of all heads together.
    """

    weight: torch.Tensor
    eps: float
    centred: bool = False
    spans_heads: bool = False
    bias: torch.Tensor | None = None

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the normalised `[pos, heads, d_head]`."""
        scaled = self._centre(vectors) * self.inverse_scale(vectors) * self.weight
        return scaled if self.bias is None else scaled + self.bias

    def inverse_scale(self, at: torch.Tensor) -> torch.Tensor:
        """Return 1 / the denominator `[..., heads or 1, 1]` for `at` `[..., heads, d_head]`."""
        dims = (-2, -1) if self.spans_heads else (-1,)
        variance = self._centre(at).square().mean(dims, keepdim=True)
        return torch.rsqrt(variance + self.eps)

    def pull_back(self, directions: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return J^T direction, where J is the norm's linear part with its scale fixed at `at`.

        Both are `[..., heads, d_head]`.
        """
        return self._centre(directions * self.weight * self.inverse_scale(at))

    def _centre(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors


@dataclass(frozen=True)
class HeadMap:
    """Clipping to `[-clip, clip]`, a norm, clipping to `clip_after`, and a multiplier.

    All but the multiplier (Falcon-H1) may be None.
    """

    clip: float | None = None
    norm: HeadNorm | None = None
    clip_after: float | None = None
    multiplier: float = 1.0

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map the results of the linear map `[pos, heads, d_head]` to the input of the rotation."""
        mapped = _clipped(self._normed(_clipped(vectors, self.clip)), self.clip_after)
        return mapped if self.multiplier == 1.0 else mapped * self.multiplier

    def pull_back(self, directions: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return J^T direction, where J is the map's linear part at `at`.

        Both are `[..., heads, d_head]`. The norm's scale is held fixed. Clipped coordinates do not
        depend on the input, so they become 0.
        """
        inside = _clipped(at, self.clip)
        directions = directions if self.multiplier == 1.0 else directions * self.multiplier
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
    """The terms of a sum `activations @ rows + bias`.

    `activations` are `[n]`, `rows` `[n, d_model]`, and `norms` `[n]` are the norms of the rows. In
    a mixture, `experts` `[n]` and `neurons` `[n]` are the expert and the neuron of each row, on the
    host.
    """

    activations: torch.Tensor
    rows: torch.Tensor
    norms: torch.Tensor
    bias: torch.Tensor | None
    experts: Ints | None = None
    neurons: Ints | None = None


@dataclass(frozen=True)
class Finish:
    """A post-norm and a multiplier, applied to a sublayer's raw result before it is added."""

    norm: Norm | None = None
    multiplier: float = 1.0

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Pull a direction `[d_model]` back through multiplier and norm, with the scale of `at`."""
        direction = direction * self.multiplier
        return direction if self.norm is None else self.norm.pull_back(direction, at)


@dataclass(frozen=True)
class AttentionWeights:
    """The linear maps of attention by head, in the row convention, and its scoring.

    `query` is `[n_heads, d_model, d_head]`, `key` `[n_kv_heads, d_model, d_head]`, `output`
    `[n_heads, d_head, d_model]`, and `bias` `[d_model]` or None. `row_norms` `[n_heads * d_head]`
    are the norms of the rows of W_O. If `finish` is None, the raw result is added to the residual.
    """

    query: torch.Tensor
    key: torch.Tensor
    output: torch.Tensor
    bias: torch.Tensor | None
    row_norms: torch.Tensor
    scoring: Scoring
    query_map: HeadMap
    key_map: HeadMap
    value_map: HeadMap
    finish: Finish | None


@dataclass(frozen=True)
class MlpRow:
    """The MLP at one position: the `terms` of its raw result, and the key columns of each term.

    `ff1` (in a gated MLP, the gate) and `up` are `[d_model, n]` for the n rows of `terms`.
    """

    terms: WeightedRows
    ff1: torch.Tensor
    up: torch.Tensor | None


class MlpWeights(Protocol):
    """The weights of a dense MLP or of a mixture of experts."""

    @property
    def finish(self) -> Finish | None:
        """The post-norm and multiplier; None if the raw result is added to the residual."""

    def row(self, acts: LayerActivations, position: int) -> MlpRow:
        """Return the MLP at one position of a prompt."""


@dataclass(frozen=True)
class MixerWeights:
    """The output map of a mixer with heads, in float32.

    `output` is `[n_heads, d_head, d_model]`, `bias` `[d_model]` or None; both are multiplied by the
    factor of what the mixer adds to the residual.
    """

    output: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one block, and whether a norm precedes attention and MLP.

    Attention or MLP is None if the block lacks it. `multiplier` is that of the sum that the block
    returns. `mixer_after_mid` says whether other
    sublayers read the residual between attention and MLP, or the block's input.
    """

    attention: AttentionWeights | None
    mlp: MlpWeights | None
    attention_prenorm: bool
    mlp_prenorm: bool
    multiplier: float = 1.0
    mixer_after_mid: bool = True

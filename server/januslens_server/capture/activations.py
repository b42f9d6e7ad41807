"""The captured activations of one block, and the rotation of its queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from januslens_server.transfer import to_device


@dataclass(frozen=True)
class Routing:
    """The `experts` `[pos, k]` that each position is routed to, and their router `weights`.

    The weights multiply the experts' results. `inputs` `[pos, k]` multiply what the experts read;
    None means 1.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    inputs: torch.Tensor | None = None

    def read(
        self, x: torch.Tensor, rows: torch.Tensor | int, slots: torch.Tensor | int
    ) -> torch.Tensor:
        """Return what the experts in some slots read, given the MLP's input there."""
        return x if self.inputs is None else x * self.inputs[rows, slots][..., None].to(x)


# A function from the number of an expert, positions `[n]` and the expert's neurons there `[n,
# d_mlp]` to the neurons that interventions leave.
NeuronChange = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


Entry = tuple[Sequence[int] | None, frozenset[int], Sequence[int]]


@dataclass(frozen=True)
class HiddenSources:
    """Sources that an intervention hides from queries, in one layer.

    Each entry has heads, query positions and source positions; None means all heads.
    """

    entries: tuple[Entry, ...]

    @cached_property
    def _columns(self) -> list[NDArray[np.int64]]:
        """The source positions of each entry."""
        return [np.array(sources, np.int64) for _, _, sources in self.entries]

    def by_copy(self, length: int) -> dict[int, HiddenSources]:
        """Return the sources of each of several copies of a prompt of `length` tokens.

        Copies without hidden sources are left out.
        """
        found: dict[int, list[Entry]] = {}
        for heads, queries, sources in self.entries:
            copies: dict[int, set[int]] = {}
            for query in queries:
                copies.setdefault(query // length, set()).add(query % length)
            for copy, own in copies.items():
                found.setdefault(copy, []).append((heads, frozenset(own), sources))
        return {copy: HiddenSources(tuple(entries)) for copy, entries in found.items()}

    def mask(
        self, positions: Sequence[int], n_heads: int, n_sources: int, device: torch.device
    ) -> torch.Tensor:
        """Return a mask `[len(positions), n_heads, n_sources]`, True for hidden sources."""
        hidden = torch.zeros(len(positions), n_heads, n_sources, dtype=torch.bool, device=device)
        for (heads, queries, _), sources in zip(self.entries, self._columns, strict=True):
            at = [i for i, position in enumerate(positions) if position in queries]
            if not at:
                continue
            rows = to_device(at, device)
            units = to_device(range(n_heads) if heads is None else heads, device)
            columns = to_device(sources[sources < n_sources], device)
            hidden[rows[:, None, None], units[:, None], columns] = True
        return hidden


@dataclass(frozen=True)
class StreamActivations:
    """The residual stream `[pos, d_model]` before and after one block.

    `before_mid` and `after_mid` are what its sublayers add, by field name of `LayerActivations`,
    before and after `residual_mid`; without one, all are in `after_mid`. `mixer_heads` `[pos,
    n_heads * d_head]` are the results of a mixer's heads, which its output map reads. The block's
    output is `multiplier` times the sum of what is added with the residual. `kept`, `gradients` and
    `replaced` are as in `LayerActivations`.
    """

    block_input: torch.Tensor
    block_output: torch.Tensor
    before_mid: Mapping[str, torch.Tensor] = field(default_factory=dict)
    after_mid: Mapping[str, torch.Tensor] = field(default_factory=dict)
    residual_mid: torch.Tensor | None = None
    mixer_heads: torch.Tensor | None = None
    multiplier: float = 1.0
    kept: Mapping[int, int] | None = None
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()

    def row(self, position: int) -> int:
        """Return the row of a position in both tensors."""
        return position if self.kept is None else self.kept[position]


# The fields of `LayerActivations` that every attention has, and those that every MLP has.
OF_ATTENTION = (
    "attention_input",
    "query",
    "key",
    "value",
    "attention_concat",
    "attention_output",
)
OF_MLP = ("mlp_input", "mlp_output")


@dataclass(frozen=True)
class LayerActivations:
    """The tensors of one block, as the model computed them, without the batch dimension.

    `key` and `value` have a row for each position of the prompt. In all other tensors, `kept` maps
    a position to its row; if `kept` is None, they also have a row for each position.

    `query` is `[pos, n_heads, d_head]`; `key` and `value` are `[pos, n_kv_heads, d_head]`. These
    are the results of the linear maps, before norms, clipping and `rotation`. `attention_concat` is
    `[pos, n_heads * d_head]`, and `neurons`, the factors of FF2's rows, `[pos, d_mlp]`. All others
    are `[pos, d_model]`. `attention_output` and `mlp_output` are added to the residual;
    `attention_sum` and `mlp_sum` are the same results before a post-norm or multiplier, and None
    without one. `mixer_output` is what other sublayers add. Parallel blocks have no `residual_mid`.
    Mixtures of experts have `routing` instead of `neurons`. `gate` `[pos, n_heads, d_head or 1]`
    multiplies the results of heads before they are concatenated; None if the model has none.
    In a block without attention or without an MLP, the fields of `OF_ATTENTION` or `OF_MLP` are
    empty tensors.
    `query_scale` and `key_scale` `[pos, d_head]` are set if latent vectors are normed between two
    linear maps: the norm's scale for each dimension of a query or key.

    `chosen_sources` `[pos, k]` are the positions that an indexer chose as sources; a position
    attends to those of them that are not later. None means all sources.

    `gradients` are those of the sums of the residual stream after a backward pass, by the name of
    their field.

    Interventions set the last fields. `mapped_query` and `mapped_key` are what enters the rotation,
    if it is not the norm of `query` and `key`. `replaced` has the names of sites whose values are
    not the model's own. `neuron_change` changes the neurons of experts.
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
    gate: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    chosen_sources: torch.Tensor | None = None
    residual_mid: torch.Tensor | None = None
    attention_sum: torch.Tensor | None = None
    mlp_sum: torch.Tensor | None = None
    mixer_output: torch.Tensor | None = None
    kept: Mapping[int, int] | None = None
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mapped_query: torch.Tensor | None = None
    mapped_key: torch.Tensor | None = None
    hidden_sources: HiddenSources | None = None
    replaced: frozenset[str] = frozenset()
    neuron_change: NeuronChange | None = None

    def row(self, position: int) -> int:
        """Return the row of a position in all tensors except `key` and `value`."""
        return position if self.kept is None else self.kept[position]


@dataclass(frozen=True)
class Rotation:
    """The matrices M_p that rotate queries and keys at position p (row convention: `q M_p`).

    `cos` and `sin` `[pos, rotary]` are the model's own values, each at both dimensions of its pair.
    The first `rotary` dimensions of a head are rotated, or with `at_end` (DeepSeek) the last. The
    dimensions of a pair are neighbours if `interleaved` (GPT-J), else half of `rotary` apart
    (Llama).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    at_end: bool = False

    def to(self, device: torch.device) -> Rotation:
        """Return the rotation on another device."""
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device))

    def turn(self, vectors: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
        """Return `v M_p` for vectors `[..., len(positions), d_head]`, each at its own position."""
        return self._turned(vectors, self.cos[positions].float(), self.sin[positions].float())

    def turn_back(self, vectors: torch.Tensor, position: int) -> torch.Tensor:
        """Return `v M_p^T` for vectors `[..., d_head]`, all at one position.

        This is the transpose, not the inverse. They differ for models that also scale the rotation.
        """
        return self._turned(vectors, self.cos[position].float(), -self.sin[position].float())

    def _turned(self, vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rotary, width = cos.shape[-1], vectors.shape[-1]
        sizes = [width - rotary, rotary] if self.at_end else [rotary, width - rotary]
        parts = list(vectors.split(sizes, dim=-1))
        turning = parts[self.at_end]
        parts[self.at_end] = turning * cos + self._quarter(turning) * sin
        return torch.cat(parts, dim=-1)

    def _quarter(self, vectors: torch.Tensor) -> torch.Tensor:
        """Rotate each pair (a, b) by 90 degrees to (-b, a); the transpose is the negative."""
        if self.interleaved:
            pairs = vectors.unflatten(-1, (-1, 2))
            return torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        first, second = vectors.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

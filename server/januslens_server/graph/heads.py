"""All heads of a layer at one query position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.attention_pattern import attention_row
from januslens_server.graph.weights import AttentionWeights


@dataclass(frozen=True)
class HeadRow:
    """All heads at one query `position`, in float32; the sources are positions `first` to it.

    Each tensor is computed when it is first read. Grouped heads share their keys and values: they
    are repeated here, not in the model.
    """

    position: int
    acts: LayerActivations
    weights: AttentionWeights

    @property
    def first(self) -> int:
        """The first position that the heads attend to."""
        return self.weights.scoring.first_source(self.position)

    @cached_property
    def asking(self) -> torch.Tensor:
        """What the heads at the position ask for `[n_heads, d_head]`; times W_K^T: HEAD_QUERY.

        The query turned by `M_p M_p^T` and pulled back through the key's norm or clip at p.
        """
        rotation, asked = self.acts.rotation, self._normed_query
        if rotation is not None:
            here = slice(self.position, self.position + 1)
            asked = rotation.turn_back(rotation.turn(asked[:, None], here)[:, 0], self.position)
        return _pulled_through_key(asked, self._key[-1], self.weights, self._group)

    @cached_property
    def matching(self) -> torch.Tensor:
        """What matches at each source `[n_heads, sources, d_head]`; times W_Q^T: memory keys.

        The keys `k_s M_s M_p^T` (M the rotary matrices) pulled back through the query's norm or
        clip.
        """
        at = self._query.expand(len(self._key), -1, -1)
        keys = self._relative_keys.transpose(0, 1)
        pulled: torch.Tensor = self.weights.query_map.pull_back(keys, at)
        return pulled.transpose(0, 1)

    @cached_property
    def values(self) -> torch.Tensor:
        """The sources' values `[n_heads, sources, d_head]`."""
        values, clip = self.acts.value[self._sources].float(), self.weights.value_clip
        return _by_head(values if clip is None else values.clamp(-clip, clip), self._group)

    @cached_property
    def pattern(self) -> torch.Tensor:
        """Attention probabilities `[n_heads, sources]`."""
        return attention_row(self._normed_query, self._relative_keys, self.weights.scoring)

    @cached_property
    def concat(self) -> torch.Tensor:
        """The heads' results `[n_heads, d_head]`."""
        concat = self.acts.attention_concat[self.acts.row(self.position)].float()
        by_head: torch.Tensor = concat.unflatten(0, (self.acts.query.shape[1], -1))
        return by_head

    @property
    def _sources(self) -> slice:
        return slice(self.first, self.position + 1)

    @property
    def _group(self) -> int:
        """Query heads that share a key head."""
        return self.acts.query.shape[1] // self.acts.key.shape[1]

    @cached_property
    def _query(self) -> torch.Tensor:
        return self.acts.query[self.acts.row(self.position)].float()

    @cached_property
    def _normed_query(self) -> torch.Tensor:
        normed: torch.Tensor = self.weights.query_map(self._query)
        return normed

    @cached_property
    def _key(self) -> torch.Tensor:
        return self.acts.key[self._sources].float()

    @cached_property
    def _relative_keys(self) -> torch.Tensor:
        """`k_s M_s M_p^T` `[n_heads, sources, d_head]`: a dot product with the query is a score."""
        keys, rotation = _by_head(self.weights.key_map(self._key), self._group), self.acts.rotation
        if rotation is None:
            return keys
        return rotation.turn_back(rotation.turn(keys, self._sources), self.position)


def head_row(position: int, acts: LayerActivations, weights: AttentionWeights) -> HeadRow:
    """The heads at `position`, from the captured activations of their layer."""
    return HeadRow(position, acts, weights)


def _by_head(vectors: torch.Tensor, group: int) -> torch.Tensor:
    """`[pos, n_kv_heads, d_head]` to `[n_heads, pos, d_head]`."""
    return vectors.repeat_interleave(group, dim=1).transpose(0, 1)


def _pulled_through_key(
    asked: torch.Tensor, key: torch.Tensor, weights: AttentionWeights, group: int
) -> torch.Tensor:
    """Each query head's direction `[n_heads, d_head]` through its own key head's map at p."""
    by_member = asked.unflatten(0, (-1, group)).transpose(0, 1)  # [group, n_kv_heads, d_head]
    pulled = weights.key_map.pull_back(by_member, key.expand_as(by_member))
    return pulled.transpose(0, 1).flatten(0, 1)

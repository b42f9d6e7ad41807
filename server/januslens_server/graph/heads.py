"""All heads of a layer at one query position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.attention_pattern import attention_row
from januslens_server.graph.weights import AttentionWeights


@dataclass(frozen=True)
class HeadRow:
    """All heads at position p, in float32; the sources are positions `first` to p.

    `asking` `[n_heads, d_head]` is what the head at p is asked to match: its query, turned by
    `M_p M_p^T` and pulled back through the key's norm or clip at p; times W_K^T it is HEAD_QUERY.
    `matching` `[n_heads, sources, d_head]` are the keys `k_s M_s M_p^T` (M the rotary matrices)
    pulled back through the query's norm or clip; times W_Q^T they are the memory keys. `values`
    `[n_heads, sources, d_head]`, `pattern` `[n_heads, sources]`, `concat` `[n_heads, d_head]`.
    """

    first: int
    asking: torch.Tensor
    matching: torch.Tensor
    values: torch.Tensor
    pattern: torch.Tensor
    concat: torch.Tensor


def head_row(position: int, acts: LayerActivations, weights: AttentionWeights) -> HeadRow:
    """Read the heads at `position` off the captured activations of their layer.

    Grouped heads share their keys and values: they are repeated here, not in the model.
    """
    first = weights.scoring.first_source(position)
    sources = slice(first, position + 1)
    group = acts.query.shape[1] // acts.key.shape[1]
    query = acts.query[acts.row(position)].float()
    key = acts.key[sources].float()
    normed_query = weights.query_map(query)
    normed_keys = _by_head(weights.key_map(key), group)
    asked, relative_keys = normed_query, normed_keys
    if acts.rotation is not None:
        here = slice(position, position + 1)
        turned = acts.rotation.turn(normed_query[:, None], here)[:, 0]
        asked = acts.rotation.turn_back(turned, position)
        turned_keys = acts.rotation.turn(normed_keys, sources)
        relative_keys = acts.rotation.turn_back(turned_keys, position)
    values = acts.value[sources].float()
    if weights.value_clip is not None:
        values = values.clamp(-weights.value_clip, weights.value_clip)
    return HeadRow(
        first=first,
        asking=_pulled_through_key(asked, key[-1], weights, group),
        matching=weights.query_map.pull_back(
            relative_keys.transpose(0, 1), query.expand(key.shape[0], -1, -1)
        ).transpose(0, 1),
        values=_by_head(values, group),
        pattern=attention_row(normed_query, relative_keys, weights.scoring),
        concat=acts.attention_concat[acts.row(position)].float().unflatten(0, (query.shape[0], -1)),
    )


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

"""The heads of attention and of other mixers at one position, and their nodes and edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.weighted_rows import (
    Result,
    RowKinds,
    add_weighted_rows,
    largest,
    left_out,
)
from januslens_server.graph.weights import (
    AttentionWeights,
    MixerWeights,
    WeightedRows,
    attention_row,
)
from januslens_server.results import EdgeKind, Members, NodeKind, NodeRun
from januslens_server.specs import Selection
from januslens_server.transfer import to_device


@dataclass(frozen=True)
class HeadRow:
    """All heads at one query `position`, in float32, with source positions from `first` on.

    Each tensor is computed on first access. With grouped-query attention, the keys and values of a
    group are repeated for each of its heads.
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
        """Queries `[n_heads, d_head]` that give HEAD_QUERY when multiplied by W_K^T.

        Each is the head's query times `M_p M_p^T`, pulled back through the norm or clip of the key
        at p.
        """
        asked, scoring = self._turned(self._normed_query), self.weights.scoring
        if scoring.query_norm is not None:
            asked = scoring.query_norm(asked)
        if scoring.key_norm is not None:
            own = _by_head(self._turned(self._key[-1])[None], self._group)[:, 0]
            asked = scoring.key_norm.pull_back(asked, own)
        if self.acts.rotation is not None:
            asked = self.acts.rotation.turn_back(asked, self.position)
        pulled = _pulled_through_key(asked, self._key[-1], self.weights, self._group)
        scale = self.acts.key_scale
        return pulled if scale is None else pulled * scale[self.acts.row(self.position)]

    @cached_property
    def matching(self) -> torch.Tensor:
        """Keys `[n_heads, sources, d_head]` that give MEMORY_KEY when multiplied by W_Q^T.

        Each is `k_s M_s M_p^T`, where M are the rotary matrices, pulled back through the norm or
        clip of the query.
        """
        at = self._query.expand(len(self._key), -1, -1)
        keys = self._relative_keys.transpose(0, 1)
        pulled: torch.Tensor = self.weights.query_map.pull_back(keys, at).transpose(0, 1)
        scale = self.acts.query_scale
        return pulled if scale is None else pulled * scale[self.acts.row(self.position)]

    @cached_property
    def values(self) -> torch.Tensor:
        """Values of the sources `[n_heads, sources, d_head]`, times the gate at `position`."""
        mapped = self.weights.value_map(self.acts.value[self._sources].float())
        values = _by_head(mapped, self._group)
        if self.acts.gate is None:
            return values
        return values * self.acts.gate[self.acts.row(self.position)][:, None]

    @cached_property
    def pattern(self) -> torch.Tensor:
        """Attention probabilities `[n_heads, sources]`."""
        scoring = self.weights.scoring
        query = self._normed_query * scoring.scale_of_query(self.position)
        return attention_row(query, self._relative_keys, scoring, self._hidden)

    @cached_property
    def concat(self) -> torch.Tensor:
        """Results of the heads `[n_heads, d_head]`."""
        concat = self.acts.attention_concat[self.acts.row(self.position)].float()
        by_head: torch.Tensor = concat.unflatten(0, (self.acts.query.shape[1], -1))
        return by_head

    @property
    def _hidden(self) -> torch.Tensor | None:
        """Sources `[n_heads, sources]` that an intervention hides or no indexer chose, or None."""
        n_heads, device = self.acts.query.shape[1], self.acts.query.device
        mask: torch.Tensor | None = None
        if self.acts.hidden_sources is not None:
            hidden = self.acts.hidden_sources
            mask = hidden.mask([self.position], n_heads, self.position + 1, device)[0]
        if self.acts.chosen_sources is not None:
            chosen = self.acts.chosen_sources[self.acts.row(self.position)].long()
            left = torch.ones(self.position + 1, dtype=torch.bool, device=device)
            left[chosen[chosen <= self.position]] = False
            mask = left.expand(n_heads, -1) if mask is None else mask | left
        return None if mask is None else mask[:, self.first :]

    @property
    def _sources(self) -> slice:
        return slice(self.first, self.position + 1)

    @property
    def _group(self) -> int:
        """Number of query heads per key head."""
        return self.acts.query.shape[1] // self.acts.key.shape[1]

    @cached_property
    def _query(self) -> torch.Tensor:
        return self.acts.query[self.acts.row(self.position)].float()

    @cached_property
    def _normed_query(self) -> torch.Tensor:
        if self.acts.mapped_query is not None:
            return self.acts.mapped_query[self.acts.row(self.position)].float()
        normed: torch.Tensor = self.weights.query_map(self._query)
        return normed

    @cached_property
    def _key(self) -> torch.Tensor:
        return self.acts.key[self._sources].float()

    @cached_property
    def _relative_keys(self) -> torch.Tensor:
        """`k_s M_s M_p^T` `[n_heads, sources, d_head]`; products with the query are scores.

        Norms of the rotated keys and queries are included, the latter with the query's scale.
        """
        if self.acts.mapped_key is not None:
            mapped = self.acts.mapped_key[self._sources].float()
        else:
            mapped = self.weights.key_map(self._key)
        keys, rotation = _by_head(mapped, self._group), self.acts.rotation
        scoring = self.weights.scoring
        if rotation is not None:
            keys = rotation.turn(keys, self._sources)
        if scoring.key_norm is not None:
            keys = scoring.key_norm(keys)
        if scoring.query_norm is not None:
            at = self._turned(self._normed_query)[:, None]
            keys = scoring.query_norm.pull_back(keys, at)
        return keys if rotation is None else rotation.turn_back(keys, self.position)

    def _turned(self, vectors: torch.Tensor) -> torch.Tensor:
        """Rotate vectors `[heads, d_head]` of the query position."""
        rotation, here = self.acts.rotation, slice(self.position, self.position + 1)
        return vectors if rotation is None else rotation.turn(vectors[:, None], here)[:, 0]


def head_row(position: int, acts: LayerActivations, weights: AttentionWeights) -> HeadRow:
    """Return the heads at `position`, given the captured activations of their layer."""
    return HeadRow(position, acts, weights)


def _by_head(vectors: torch.Tensor, group: int) -> torch.Tensor:
    """Repeat `[pos, n_kv_heads, d_head]` for the heads of each group: `[n_heads, pos, d_head]`."""
    return vectors.repeat_interleave(group, dim=1).transpose(0, 1)


def _pulled_through_key(
    asked: torch.Tensor, key: torch.Tensor, weights: AttentionWeights, group: int
) -> torch.Tensor:
    """Pull directions `[n_heads, d_head]` back through the maps of their key heads at p."""
    by_member = asked.unflatten(0, (-1, group)).transpose(0, 1)  # [group, n_kv_heads, d_head]
    pulled = weights.key_map.pull_back(by_member, key.expand_as(by_member))
    return pulled.transpose(0, 1).flatten(0, 1)


ATTENTION_KINDS = RowKinds(NodeKind.ATTENTION_NEURON, NodeKind.ATTENTION_BIAS)
# Kinds that need the sources of heads, and kinds that need the results of heads.
_OF_MEMORIES = (NodeKind.MEMORY_KEY, NodeKind.MEMORY_VALUE, NodeKind.OTHER)
_OF_HEADS = (NodeKind.HEAD_OUTPUT, NodeKind.ATTENTION_CONCAT, *_OF_MEMORIES)
# The sum over heads, and the kind of one head's node, for queries, keys and values.
_INPUTS = (
    (NodeKind.QUERY, NodeKind.HEAD_QUERY),
    (NodeKind.KEY, NodeKind.HEAD_KEY),
    (NodeKind.VALUE, NodeKind.HEAD_VALUE),
)
# Kinds of the nodes inside attention.
IN_ATTENTION = frozenset(
    {*_OF_HEADS, *ATTENTION_KINDS, *(kind for kinds in _INPUTS for kind in kinds)}
)


def add_attention(
    flow: FlowBuilder,
    attention_input: str,
    acts: LayerActivations,
    weights: AttentionWeights,
    selection: Selection,
    result: Result,
) -> str:
    """Add the nodes between attention's input and its raw result; return the result's id."""
    if not flow.shows(*IN_ATTENTION):
        return flow.node(result.kind, result.vector)
    row = head_row(flow.position, acts, weights)
    effect = flow.effect(selection.by)
    # Products of what a head writes with the effect are products of its values with this [h, e].
    within = None if effect is None else weights.output @ effect
    scores = row.concat.norm(dim=-1) if within is None else (row.concat * within).sum(-1)
    named = selection.heads_of(flow.layer)
    heads = _chosen(scores, selection.heads) if named is None else _named(named, scores)
    queries = _add_projections(flow, attention_input, acts, row, weights, heads)
    if not flow.shows(*_OF_HEADS):
        concat = flow.refer(NodeRun(NodeKind.ATTENTION_CONCAT, flow.position, flow.layer))[0]
        return _add_result(flow, concat, row, weights, selection, result)
    outputs = torch.einsum("he,hed->hd", row.concat, weights.output)
    head_outputs = flow.nodes([_heads(flow, NodeKind.HEAD_OUTPUT, heads)], outputs[heads.pick])
    if flow.shows(*_OF_MEMORIES):
        pattern = row.pattern[heads.pick]
        if within is not None:
            products = torch.einsum("kse,ke->ks", row.values[heads.pick], within[heads.pick])
            pattern = pattern * products
        listed = selection.sources_of(flow.layer)
        if listed is None:
            sources = _strongest(pattern, selection.memory_values_per_head, row.first)
        else:
            sources = _listed(listed, heads, row)
        _add_memories(flow, queries, head_outputs, outputs, row, weights, heads, sources)
    concat = _add_concat(flow, head_outputs, outputs, heads)
    return _add_result(flow, concat, row, weights, selection, result)


class _Heads(NamedTuple):
    """The selected heads in ascending order, and an index that selects them in a tensor."""

    numbers: list[int]
    pick: torch.Tensor | slice


def _chosen(sizes: torch.Tensor, count: int) -> _Heads:
    """Select the heads with the largest `sizes` `[n_heads]`; a slice of all avoids a copy."""
    if count == 0 or count >= len(sizes):
        return _Heads(list(range(len(sizes))), slice(None))
    index = largest(sizes, count).sort().values
    return _Heads(index.tolist(), index)


def _named(numbers: list[int], sizes: torch.Tensor) -> _Heads:
    """Select heads by number; `sizes` is `[n_heads]`."""
    if len(numbers) == len(sizes):
        return _Heads(numbers, slice(None))
    return _Heads(numbers, to_device(numbers, sizes.device))


class _Sources(NamedTuple):
    """The selected sources of the selected heads.

    `places` has the positions of each head. `offsets` `[heads, width]` has the same sources,
    counted from the first that heads attend to; rows of heads with fewer sources are padded. `real`
    `[m]` are the indices of entries that are not padding, in the flattened `offsets`; None = all.
    """

    places: list[list[int]]
    offsets: torch.Tensor
    real: torch.Tensor | None

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` `[heads, width, ...]` as `[m, ...]`, without padding."""
        values = values.flatten(0, 1)
        return values if self.real is None else values[self.real]

    def left_out(self, count: int) -> torch.Tensor:
        """Return a mask `[heads, count]` that is True for sources that are not selected."""
        if self.real is None:
            return left_out(count, self.offsets)
        mask = torch.ones(len(self.places), count, dtype=torch.bool, device=self.offsets.device)
        rows = self.real // max(1, self.offsets.shape[1])
        mask[rows, self.offsets.flatten()[self.real]] = False
        return mask


def _strongest(scores: torch.Tensor, count: int, first: int) -> _Sources:
    """Select the sources of each head with the largest `scores` `[heads, sources]`."""
    index = largest(scores, count)
    return _Sources((first + index).tolist(), index, None)


def _listed(listed: Mapping[int, list[int]], heads: _Heads, row: HeadRow) -> _Sources:
    """Select sources by position, as far as the heads attend to them."""
    attended = range(row.first, row.position + 1)
    places = [[at for at in listed.get(head, ()) if at in attended] for head in heads.numbers]
    width = max(map(len, places), default=0)
    index = [[at - row.first for at in own] + [0] * (width - len(own)) for own in places]
    real = [i * width + j for i, own in enumerate(places) for j in range(len(own))]
    device = row.pattern.device
    shape = len(places), width
    return _Sources(places, to_device(index, device).reshape(shape), to_device(real, device))


# Kinds of the nodes inside a mixer with heads.
IN_MIXER = (NodeKind.MIXER_HEAD, NodeKind.OTHER)


def add_mixer(
    flow: FlowBuilder,
    results: torch.Tensor,
    weights: MixerWeights,
    selection: Selection,
    result: Result,
    *,
    replaced: bool,
) -> str:
    """Add a mixer's result at one position and the heads that it sums; return the result's id.

    `results` `[n_heads * d_head]` are those of the heads, which are selected as those of attention.
    `replaced` is as in `_add_parts`.
    """
    by_head = results.float().unflatten(0, (len(weights.output), -1))
    outputs = torch.einsum("he,hed->hd", by_head, weights.output)
    effect = flow.effect(selection.by)
    heads = _chosen(by_head.norm(dim=-1) if effect is None else outputs @ effect, selection.heads)
    ids = flow.nodes([_heads(flow, NodeKind.MIXER_HEAD, heads)], outputs[heads.pick])
    total = flow.node(result.kind, result.vector)
    _add_parts(flow, ids, outputs, heads, total, result, weights.bias, replaced=replaced)
    return total


def _heads(flow: FlowBuilder, kind: NodeKind, heads: _Heads) -> NodeRun:
    return NodeRun(kind, flow.position, flow.layer, heads=heads.numbers)


def _add_projections(
    flow: FlowBuilder,
    attention_input: str,
    acts: LayerActivations,
    row: HeadRow,
    weights: AttentionWeights,
    heads: _Heads,
) -> list[str]:
    """Add QUERY, KEY, VALUE and the nodes of their heads; return the ids of HEAD_QUERY."""
    shown = [flow.shows(*kinds) for kinds in _INPUTS]
    position, layer = flow.position, flow.layer
    if not any(shown):
        return flow.refer(_heads(flow, NodeKind.HEAD_QUERY, heads))
    pulled = torch.stack(
        [
            pull(row, weights) if wanted else torch.zeros_like(weights.output[:, 0])
            for pull, wanted in zip((_queries, _keys, _values), shown, strict=True)
        ]
    )
    wholes = [whole for whole, _ in _INPUTS]
    whole_ids = flow.nodes([NodeRun(kind, position, layer) for kind in wholes], pulled.sum(1))
    size = acts.attention_input[acts.row(position)].float().norm().expand(3)
    flow.edges(EdgeKind.PROJECT, [attention_input] * 3, whole_ids, size)
    vectors = pulled[:, heads.pick].flatten(0, 1)
    ids = flow.nodes([_heads(flow, kind, heads) for _, kind in _INPUTS], vectors)
    split = [whole for whole in whole_ids for _ in heads.numbers]
    flow.edges(EdgeKind.SPLIT, split, ids, vectors.norm(dim=-1))
    return ids[: len(heads.numbers)]


def _queries(row: HeadRow, weights: AttentionWeights) -> torch.Tensor:
    """Return HEAD_QUERY of all heads `[n_heads, d_model]`."""
    asking = row.asking.unflatten(0, (len(weights.key), -1))  # [n_kv_heads, group, d_head]
    return torch.einsum("kge,kde->kgd", asking, weights.key).flatten(0, 1)


def _keys(row: HeadRow, weights: AttentionWeights) -> torch.Tensor:
    """Return HEAD_KEY of all heads `[n_heads, d_model]`."""
    return torch.einsum("he,hde->hd", row.matching[:, -1], weights.query)


def _values(row: HeadRow, weights: AttentionWeights) -> torch.Tensor:
    """Return HEAD_VALUE of all heads `[n_heads, d_model]`."""
    return torch.einsum("he,hed->hd", row.values[:, -1], weights.output)


def _add_memories(
    flow: FlowBuilder,
    head_queries: list[str],
    head_outputs: list[str],
    outputs: torch.Tensor,
    row: HeadRow,
    weights: AttentionWeights,
    heads: _Heads,
    sources: _Sources,
) -> None:
    """Add keys and values of the selected sources, and the sum of the other sources."""
    pattern = row.pattern[heads.pick]
    maps, places, offsets = weights.output[heads.pick], sources.places, sources.offsets
    attended = sources.flat(pattern.gather(1, offsets))

    def of_sources(vectors: torch.Tensor) -> torch.Tensor:
        """Select the sources from `[n_heads, sources, d_head]`."""
        return vectors[heads.pick].gather(1, offsets[:, :, None].expand(-1, -1, vectors.shape[2]))

    def of_each(ids: list[str]) -> list[str]:
        """Repeat the id of each head for its sources."""
        return [i for i, own in zip(ids, places, strict=True) for _ in own]

    key_ids = list[str]()
    if flow.shows(NodeKind.MEMORY_KEY):
        matching, queries = of_sources(row.matching), weights.query[heads.pick]
        keys = sources.flat(torch.einsum("kse,kde->ksd", matching, queries))
        key_ids = flow.nodes([_memories(flow, NodeKind.MEMORY_KEY, heads, places)], keys)
        flow.edges(EdgeKind.ATTEND, of_each(head_queries), key_ids, attended, attended)
    totals = outputs[heads.pick]
    if flow.shows(NodeKind.MEMORY_VALUE):
        values = sources.flat(torch.einsum("kse,ked->ksd", of_sources(row.values), maps))
        value_ids = flow.nodes([_memories(flow, NodeKind.MEMORY_VALUE, heads, places)], values)
        if key_ids:
            flow.edges(EdgeKind.RECALL, key_ids, value_ids, attended, attended)
        whole = sources.flat(totals[:, None].expand(-1, offsets.shape[1], -1))
        written = of_each(head_outputs)
        flow.parts(value_ids, written, attended[:, None] * values, whole, attended)
    replaced = "HEAD_RESULT" in row.acts.replaced
    most = min(map(len, places), default=0)
    if (replaced or most < pattern.shape[1]) and flow.shows(NodeKind.OTHER):
        rest = torch.where(sources.left_out(pattern.shape[1]), pattern, 0.0)
        if replaced:  # OTHER is also what an intervention put in place of the sources' values
            shown = torch.einsum("ks,kse->ke", pattern - rest, row.values[heads.pick])
            mixed = row.concat[heads.pick] - shown
        else:
            mixed = torch.einsum("ks,kse->ke", rest, row.values[heads.pick])
        left = torch.einsum("ke,ked->kd", mixed, maps)
        attended_to = (row.first, flow.position)
        members = [Members.left_out(attended_to, pattern.shape[1], shown) for shown in places]
        others = flow.others(_heads(flow, NodeKind.HEAD_OUTPUT, heads), left, members)
        flow.parts(others, head_outputs, left, totals, rest.sum(1))


def _memories(flow: FlowBuilder, kind: NodeKind, heads: _Heads, places: list[list[int]]) -> NodeRun:
    return NodeRun(
        kind,
        flow.position,
        flow.layer,
        heads=[head for head, at in zip(heads.numbers, places, strict=True) for _ in at],
        source_positions=list(chain.from_iterable(places)),
    )


def _add_concat(
    flow: FlowBuilder, head_outputs: list[str], outputs: torch.Tensor, heads: _Heads
) -> str:
    """Add the sum of all heads, which is not projected; return its id."""
    result = Result(NodeKind.ATTENTION_CONCAT, outputs.sum(0))
    concat = flow.node(*result, projected=False)
    _add_parts(flow, head_outputs, outputs, heads, concat, result)
    return concat


def _add_parts(
    flow: FlowBuilder,
    ids: list[str],
    outputs: torch.Tensor,
    heads: _Heads,
    total: str,
    result: Result,
    bias: torch.Tensor | None = None,
    *,
    replaced: bool = False,
) -> None:
    """Add the edges from heads to the sum with the id `total`, and OTHER.

    `outputs` `[n_heads, d_model]` are those of all heads, `ids` the nodes of the selected ones.
    OTHER are the heads left out and the bias, or the rest if an intervention `replaced` the sum.
    """
    parts = outputs[heads.pick]
    if flow.shows(NodeKind.OTHER):
        rest = result.vector - parts.sum(0) if replaced else _left_out(outputs, heads, bias)
        if rest is not None:
            junction = NodeRun(result.kind, flow.position, flow.layer)
            listed = Members.left_out([len(outputs)], len(outputs), heads.numbers)
            ids = ids + flow.others(junction, rest[None], None if replaced else [listed])
            parts = torch.cat([parts, rest[None]])
    flow.parts(ids, total, parts, result.vector)


def _left_out(
    outputs: torch.Tensor, heads: _Heads, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the sum `[d_model]` of the heads that are not selected and the bias, if any."""
    if isinstance(heads.pick, slice):
        return bias
    kept = left_out(len(outputs), heads.pick)[:, None]
    rest = torch.where(kept, outputs, 0.0).sum(0)
    return rest if bias is None else rest + bias


def _add_result(
    flow: FlowBuilder,
    concat: str,
    row: HeadRow,
    weights: AttentionWeights,
    selection: Selection,
    result: Result,
) -> str:
    """Add the rows of W_O with their activations, the bias and their sum; return the sum's id."""
    if not flow.shows(*ATTENTION_KINDS, NodeKind.OTHER):
        return flow.node(result.kind, result.vector)
    activations = row.concat.flatten()
    terms = WeightedRows(activations, weights.output.flatten(0, 1), weights.row_norms, weights.bias)
    replaced = "ATTENTION_OUTPUT" in row.acts.replaced
    added = add_weighted_rows(flow, terms, ATTENTION_KINDS, selection, result, replaced=replaced)
    neurons = added.neurons
    sources = [concat] * len(neurons.ids)
    flow.edges(EdgeKind.ACTIVATE, sources, neurons.ids, activations[neurons.picked])
    return added.total

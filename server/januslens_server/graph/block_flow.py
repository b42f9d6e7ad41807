"""Build the flow graph of one block at some positions, and that of the final norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch

from januslens_server.capture import LayerActivations, StreamActivations
from januslens_server.graph.attention import IN_ATTENTION, add_attention, add_mixer
from januslens_server.graph.flow import Flow, FlowBuilder
from januslens_server.graph.mlp import IN_MLP, add_mlp
from januslens_server.graph.weighted_rows import Result
from januslens_server.graph.weights import BlockWeights, Finish, MixerWeights
from januslens_server.results import EdgeKind, ModelFacts, NodeKind, NodeRun
from januslens_server.specs import Selection
from januslens_server.transfer import to_device


class _Kinds(NamedTuple):
    """Kinds of a sublayer's input and output, and of its sum before a post-norm or multiplier."""

    input: NodeKind
    sum: NodeKind
    output: NodeKind


ATTENTION = _Kinds(NodeKind.ATTENTION_INPUT, NodeKind.ATTENTION_SUM, NodeKind.ATTENTION_OUTPUT)
MLP = _Kinds(NodeKind.MLP_INPUT, NodeKind.MLP_SUM, NodeKind.MLP_OUTPUT)


class _Add(Protocol):
    """Adds the nodes inside a sublayer, given the id of its input; returns the id of its result."""

    def __call__(self, flow: FlowBuilder, source: str, /, *, result: Result) -> str: ...


@dataclass(frozen=True)
class _Sublayer:
    """Attention or MLP at n positions.

    `normed`, `raw` and `added` are `[pos, d_model]`; `rows` `[n]` are the rows of the positions. If
    `normed` is None, the sublayer reads the residual itself. If `finish` is None, its raw result is
    added to the residual unchanged. The gradients `[n, d_model]` of `raw` and `added` are None
    without a backward pass.
    """

    kinds: _Kinds
    inside: frozenset[NodeKind]
    normed: torch.Tensor | None
    raw: torch.Tensor | None
    rows: torch.Tensor
    added: torch.Tensor
    finish: Finish | None
    add: _Add
    sum_gradients: torch.Tensor | None
    added_gradients: torch.Tensor | None


def input_nodes(layer: int, positions: Sequence[int]) -> NodeRun:
    """Return the input nodes of block `layer`, which are the output nodes of the block below."""
    if layer == 0:
        return NodeRun(NodeKind.BLOCK_INPUT, positions)
    return NodeRun(NodeKind.BLOCK_OUTPUT, positions, layer - 1)


def block_flow(
    flow: FlowBuilder,
    acts: LayerActivations,
    weights: BlockWeights,
    selection: Selection,
    below: int | None,
) -> Flow:
    """Build the flow graph of one block at some positions, from its input to its output.

    The nodes are added to `flow`, whose layer is the block's. `below` is the layer that was sent
    before this one, or None. If it is not the next lower layer, the input nodes are added here,
    with GAP edges from the outputs of `below`.
    """
    rows = _rows(acts, flow)
    gradients = {name: found[rows] for name, found in acts.gradients.items()}
    residual, total = acts.block_input[rows].float(), acts.block_output[rows].float()
    outside, flow = flow, _inside(flow, weights.multiplier, total)
    source = _add_input(flow.toward(gradients.get("block_input")), residual, below)
    terms: Terms = [(source, residual)]
    if weights.attention is not None:
        attention = _Sublayer(
            kinds=ATTENTION,
            inside=IN_ATTENTION,
            rows=rows,
            normed=acts.attention_input if weights.attention_prenorm else None,
            raw=acts.attention_sum,
            added=acts.attention_output,
            finish=weights.attention.finish,
            add=partial(add_attention, acts=acts, weights=weights.attention, selection=selection),
            sum_gradients=gradients.get("attention_sum"),
            added_gradients=gradients.get("attention_output"),
        )
        attended = _add_sublayer(flow, source, residual, attention)
        terms.append((attended, attention.added[rows].float()))

    def mixed() -> Terms:
        if acts.mixer_output is None:
            return []
        vectors = acts.mixer_output[rows].float()
        inside = flow.toward(gradients.get("mixer_output"))
        return [(inside.states(NodeKind.MIXER_OUTPUT, vectors), vectors)]

    if not weights.mixer_after_mid:
        terms += mixed()
    if acts.residual_mid is not None:
        middle = acts.residual_mid[rows].float()
        inside = flow.toward(gradients.get("residual_mid"))
        source = _add_sum(inside, NodeKind.RESIDUAL_MID, middle, terms, acts.replaced)
        residual = middle
        terms = [(source, middle)]
    if weights.mlp is not None:
        mlp = _Sublayer(
            kinds=MLP,
            inside=IN_MLP,
            rows=rows,
            normed=acts.mlp_input if weights.mlp_prenorm else None,
            raw=acts.mlp_sum,
            added=acts.mlp_output,
            finish=weights.mlp.finish,
            add=partial(add_mlp, acts=acts, weights=weights.mlp, selection=selection),
            sum_gradients=gradients.get("mlp_sum"),
            added_gradients=gradients.get("mlp_output"),
        )
        terms.append((_add_sublayer(flow, source, residual, mlp), mlp.added[rows].float()))
    if weights.mixer_after_mid:
        terms += mixed()
    whole = outside.toward(gradients.get("block_output"))
    _add_sum(whole, NodeKind.BLOCK_OUTPUT, total, terms, acts.replaced, weights.multiplier)
    return outside.build()


def stream_flow(
    flow: FlowBuilder,
    acts: StreamActivations,
    mixer: MixerWeights | None,
    selection: Selection,
    below: int | None,
) -> Flow:
    """Build the flow graph of a block without known parts: residual stream and sublayers.

    Without sublayers, OTHER is all that the block adds to the residual stream, and what an
    intervention adds to its output. `mixer` is the output map of a mixer whose heads are shown.
    `below` is as in `block_flow`.
    """
    rows = _rows(acts, flow)
    gradients = {name: found[rows] for name, found in acts.gradients.items()}
    residual, total = acts.block_input[rows].float(), acts.block_output[rows].float()
    outside, flow = flow, _inside(flow, acts.multiplier, total)
    source = _add_input(flow.toward(gradients.get("block_input")), residual, below)
    whole = outside.toward(gradients.get("block_output"))

    def terms(added: Mapping[str, torch.Tensor]) -> Terms:
        vectors = {NodeKind[name.upper()]: found[rows] for name, found in added.items()}
        return [(states(kind, vector), vector) for kind, vector in vectors.items()]

    def states(kind: NodeKind, vectors: torch.Tensor) -> list[str]:
        inside = flow.toward(gradients.get(kind.name.lower()))
        if kind is not NodeKind.MIXER_OUTPUT or mixer is None or acts.mixer_heads is None:
            return inside.states(kind, vectors)
        replaced = kind.name in acts.replaced
        return [
            add_mixer(
                inside.at(i), results, mixer, selection, Result(kind, vector), replaced=replaced
            )
            for i, (results, vector) in enumerate(zip(acts.mixer_heads[rows], vectors, strict=True))
        ]

    if acts.residual_mid is not None:
        middle = acts.residual_mid[rows].float()
        parts = [(source, residual), *terms(acts.before_mid)]
        inside = flow.toward(gradients.get("residual_mid"))
        source = _add_sum(inside, NodeKind.RESIDUAL_MID, middle, parts, acts.replaced)
        residual = middle
    if acts.after_mid:
        parts = [(source, residual), *terms(acts.after_mid)]
        _add_sum(whole, NodeKind.BLOCK_OUTPUT, total, parts, acts.replaced, acts.multiplier)
        return outside.build()
    outputs = whole.states(NodeKind.BLOCK_OUTPUT, total)
    added = total - residual
    others = whole.others(NodeRun(NodeKind.BLOCK_OUTPUT, flow.positions, flow.layer), added)
    whole.sums([(source, residual), (others, added)], outputs, total)
    return outside.build()


def _inside(flow: FlowBuilder, multiplier: float, total: torch.Tensor) -> FlowBuilder:
    """Return a builder for the parts of a sum that a block multiplies to return `total`."""
    return flow if multiplier == 1.0 else flow.before(Finish(multiplier=multiplier), total)


def _rows(acts: LayerActivations | StreamActivations, flow: FlowBuilder) -> torch.Tensor:
    """Return the rows `[n]` of the flow's positions in the captured tensors."""
    rows = [acts.row(position) for position in flow.positions]
    return to_device(rows, acts.block_input.device)


def _add_input(flow: FlowBuilder, residual: torch.Tensor, below: int | None) -> list[str]:
    nodes = input_nodes(flow.layer, flow.positions)
    if below is not None and below == flow.layer - 1:
        return flow.refer(nodes)
    ids = flow.nodes([nodes], residual)
    if below is not None:
        before = NodeRun(NodeKind.BLOCK_OUTPUT, flow.positions, below)
        flow.edges(EdgeKind.GAP, flow.refer(before), ids, residual.norm(dim=-1))
    return ids


def _add_sublayer(
    flow: FlowBuilder, sources: list[str], residual: torch.Tensor, sublayer: _Sublayer
) -> list[str]:
    """Add norm, sublayer and output; return the ids of the outputs."""
    kinds, rows = sublayer.kinds, sublayer.rows
    if not flow.shows(*kinds, *sublayer.inside):
        return flow.refer(NodeRun(kinds.output, flow.positions, flow.layer))
    if sublayer.normed is not None:
        sources = _add_normed(flow, kinds.input, sources, residual, sublayer.normed, rows)
    added = sublayer.added[rows].float()
    whole = flow.toward(sublayer.added_gradients)
    if sublayer.finish is None or sublayer.raw is None:
        return _add_inside(whole, sources, sublayer, kinds.output, added)
    raw = sublayer.raw[rows].float()
    inside = flow.toward(sublayer.sum_gradients)
    totals = _add_inside(inside, sources, sublayer, kinds.sum, raw, sublayer.finish)
    outputs = whole.states(kinds.output, added)
    kind = EdgeKind.SCALE if sublayer.finish.norm is None else EdgeKind.NORM
    flow.edges(kind, totals, outputs, raw.norm(dim=-1))
    return outputs


def _add_inside(
    flow: FlowBuilder,
    sources: list[str],
    sublayer: _Sublayer,
    kind: NodeKind,
    results: torch.Tensor,
    finish: Finish | None = None,
) -> list[str]:
    """Add the nodes inside a sublayer and its raw `results` `[n, d_model]`; return their ids."""
    if not flow.shows(*sublayer.inside):
        return flow.states(kind, results)
    ids = []
    for i, (source, result) in enumerate(zip(sources, results, strict=True)):
        inside = flow.at(i) if finish is None else flow.at(i).before(finish, result[None])
        ids.append(sublayer.add(inside, source, result=Result(kind, result)))
    return ids


def _add_normed(
    flow: FlowBuilder,
    kind: NodeKind,
    sources: list[str],
    before: torch.Tensor,
    normed: torch.Tensor,
    rows: torch.Tensor,
) -> list[str]:
    if not flow.shows(kind):
        return flow.refer(NodeRun(kind, flow.positions, flow.layer))
    ids = flow.states(kind, normed[rows].float())
    flow.edges(EdgeKind.NORM, sources, ids, before.norm(dim=-1))
    return ids


# The terms of a sum, each with the ids of its nodes and their vectors `[n, d_model]`.
Terms = list[tuple[list[str], torch.Tensor]]


def _add_sum(
    flow: FlowBuilder,
    kind: NodeKind,
    total: torch.Tensor,
    terms: Terms,
    replaced: frozenset[str],
    multiplier: float = 1.0,
) -> list[str]:
    """Add nodes of the residual stream with vectors `total` `[n, d_model]`, and their terms.

    The node is `multiplier` times the sum of the terms. If an intervention replaced it, OTHER is
    the rest.
    """
    ids = flow.states(kind, total)
    terms = [(sources, vectors * multiplier) for sources, vectors in terms]
    if kind.name in replaced and flow.shows(kind) and flow.shows(NodeKind.OTHER):
        rest = total - torch.stack([vectors for _, vectors in terms]).sum(0)
        others = flow.others(NodeRun(kind, flow.positions, flow.layer), rest)
        terms.append((others, rest))
    flow.sums(terms, ids, total)
    return ids


def final_flow(
    last_layer: int, positions: Sequence[int], residual: torch.Tensor, normed: torch.Tensor
) -> Flow:
    """Build FINAL_NORM and PREDICTION, given the vectors `[n, d_model]` before and after the norm.

    Both are already normed, so they are projected by the unembedding only.
    """
    flow = FlowBuilder(last_layer, positions, directions=None)
    norms = flow.nodes([NodeRun(NodeKind.FINAL_NORM, positions)], normed)
    predictions = flow.nodes([NodeRun(NodeKind.PREDICTION, positions)], normed)
    below = NodeRun(NodeKind.BLOCK_OUTPUT, positions, last_layer)
    flow.edges(EdgeKind.NORM, below.ids, norms, residual.norm(dim=-1))
    flow.edges(EdgeKind.PROJECT, norms, predictions, normed.norm(dim=-1))
    return flow.build()


_ONE_EACH = (
    NodeKind.BLOCK_INPUT,
    NodeKind.ATTENTION_INPUT,
    NodeKind.QUERY,
    NodeKind.KEY,
    NodeKind.VALUE,
    NodeKind.ATTENTION_CONCAT,
    NodeKind.ATTENTION_BIAS,
    NodeKind.ATTENTION_SUM,
    NodeKind.ATTENTION_OUTPUT,
    NodeKind.RESIDUAL_MID,
    NodeKind.MLP_INPUT,
    NodeKind.MLP_BIAS,
    NodeKind.MLP_SUM,
    NodeKind.MLP_OUTPUT,
    NodeKind.BLOCK_OUTPUT,
)
_PER_HEAD = (NodeKind.HEAD_QUERY, NodeKind.HEAD_KEY, NodeKind.HEAD_VALUE, NodeKind.HEAD_OUTPUT)
_PER_NEURON = (NodeKind.MLP_KEY, NodeKind.MLP_UP, NodeKind.MLP_VALUE)


def block_nodes(facts: ModelFacts, selection: Selection, sources: int) -> Mapping[NodeKind, int]:
    """Return the maximum number of nodes of each kind, for a position with `sources` sources.

    MIXER_OUTPUT, which few blocks with known parts have, is not among them.
    """
    heads = _picked(selection.heads, facts.n_heads)
    neurons = _neurons(selection, facts.d_mlp * max(1, facts.n_experts))
    if selection.named_heads:
        heads = _most_in_a_layer(layer for layer, _ in selection.named_heads)
    if selection.only_neurons:
        neurons = _most_in_a_layer(unit.layer for unit in set(selection.only_neurons))
    memories = heads * _picked(selection.memory_values_per_head, sources)
    if selection.only_sources:
        memories = _most_in_a_layer(named.layer for named in set(selection.only_sources))
    return {
        **dict.fromkeys(_ONE_EACH, 1),
        **dict.fromkeys(_PER_HEAD, heads),
        **dict.fromkeys(_PER_NEURON, neurons),
        NodeKind.MEMORY_KEY: memories,
        NodeKind.MEMORY_VALUE: memories,
        NodeKind.ATTENTION_NEURON: _neurons(selection, facts.n_heads * facts.d_head),
        # One per head, one of the heads, one each of W_O and FF2, and of replaced residuals.
        NodeKind.OTHER: heads + 5,
    }


# The kinds of nodes that every model shows, and those that show its sublayers as well.
STREAM_KINDS = frozenset(
    {
        NodeKind.BLOCK_INPUT,
        NodeKind.BLOCK_OUTPUT,
        NodeKind.FINAL_NORM,
        NodeKind.PREDICTION,
        NodeKind.OTHER,
    }
)
SUBLAYER_KINDS = STREAM_KINDS | {
    NodeKind.ATTENTION_OUTPUT,
    NodeKind.MIXER_OUTPUT,
    NodeKind.RESIDUAL_MID,
    NodeKind.MLP_OUTPUT,
}
# Maximum number of nodes of each kind at one position of a block without known parts, apart from
# the heads of a mixer.
COARSE_NODES = dict.fromkeys(SUBLAYER_KINDS - {NodeKind.FINAL_NORM, NodeKind.PREDICTION}, 1) | {
    NodeKind.OTHER: 2
}


def mixer_nodes(selection: Selection, heads: int) -> Mapping[NodeKind, int]:
    """Return the maximum number of nodes at one position for the `heads` of a mixer."""
    return {NodeKind.MIXER_HEAD: _picked(selection.heads, heads), NodeKind.OTHER: 1}


def _most_in_a_layer(layers: Iterable[int]) -> int:
    return max(Counter(layers).values())


def _neurons(selection: Selection, width: int) -> int:
    return min(_picked(selection.top_neurons, width) + selection.bottom_neurons, width)


def _picked(count: int, available: int) -> int:
    return min(count, available) if count else available

"""Attention at one position: heads, what they ask for, what they recall, what they write.

docs/semantics.md, "Flow graph"; VISIT section 3. A pull-back is the gradient of the dot product
q k with respect to the attention input, the other side held fixed: a vector of the residual basis.
"""

from __future__ import annotations

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.flow import FlowBuilder
from januslens_server.graph.heads import HeadRow, head_row
from januslens_server.graph.selection import largest, left_out
from januslens_server.graph.terms import WeightedRows
from januslens_server.graph.weighted_rows import (
    Result,
    RowKinds,
    add_weighted_rows,
)
from januslens_server.graph.weights import AttentionWeights
from januslens_server.results import EdgeKind, Node, NodeKind
from januslens_server.specs import Selection

ATTENTION_KINDS = RowKinds(NodeKind.ATTENTION_NEURON, NodeKind.ATTENTION_BIAS)


def add_attention(
    flow: FlowBuilder,
    attention_input: str,
    acts: LayerActivations,
    weights: AttentionWeights,
    selection: Selection,
    result: Result,
) -> str:
    """Add everything between the attention's input and its raw result; gives the latter's id."""
    row = head_row(flow.position, acts, weights)
    heads = largest(row.concat.norm(dim=-1), selection.heads)
    heads = heads.sort().values
    queries = _add_projections(flow, attention_input, acts, row, weights, heads)
    outputs = torch.einsum("he,hed->hd", row.concat, weights.output)
    head_outputs = flow.nodes(_heads(flow, NodeKind.HEAD_OUTPUT, heads), outputs[heads])
    _add_memories(flow, queries, head_outputs, outputs, row, weights, heads, selection)
    concat = _add_concat(flow, head_outputs, outputs, heads)
    return _add_result(flow, concat, row, weights, selection, result)


def _heads(flow: FlowBuilder, kind: NodeKind, heads: torch.Tensor) -> list[Node]:
    return [Node(kind, flow.position, flow.layer, head=head) for head in heads.tolist()]


def _add_projections(
    flow: FlowBuilder,
    attention_input: str,
    acts: LayerActivations,
    row: HeadRow,
    weights: AttentionWeights,
    heads: torch.Tensor,
) -> list[str]:
    """QUERY, KEY, VALUE and their heads at the position itself; gives HEAD_QUERY's ids."""
    group = weights.query.shape[0] // weights.key.shape[0]
    key_weights = weights.key.repeat_interleave(group, dim=0)
    pulled = {
        (NodeKind.QUERY, NodeKind.HEAD_QUERY): torch.einsum("he,hde->hd", row.asking, key_weights),
        (NodeKind.KEY, NodeKind.HEAD_KEY): torch.einsum(
            "he,hde->hd", row.matching[:, -1], weights.query
        ),
        (NodeKind.VALUE, NodeKind.HEAD_VALUE): torch.einsum(
            "he,hed->hd", row.values[:, -1], weights.output
        ),
    }
    size = acts.attention_input[flow.position].float().norm()[None]
    ids: dict[NodeKind, list[str]] = {}
    for (whole, by_head), vectors in pulled.items():
        whole_id = flow.node(whole, vectors.sum(0))
        flow.edges(EdgeKind.PROJECT, [attention_input], [whole_id], size)
        ids[by_head] = flow.nodes(_heads(flow, by_head, heads), vectors[heads])
        sizes = vectors[heads].norm(dim=-1)
        flow.edges(EdgeKind.SPLIT, [whole_id] * len(heads), ids[by_head], sizes)
    return ids[NodeKind.HEAD_QUERY]


def _add_memories(
    flow: FlowBuilder,
    head_queries: list[str],
    head_outputs: list[str],
    outputs: torch.Tensor,
    row: HeadRow,
    weights: AttentionWeights,
    heads: torch.Tensor,
    selection: Selection,
) -> None:
    """The sources each head attends to most: their keys, their values, and the rest."""
    pattern = row.pattern[heads]
    sources = largest(pattern, selection.memory_values_per_head)
    probability = pattern.gather(1, sources)
    picked = heads[:, None], sources
    keys = torch.einsum("kse,kde->ksd", row.matching[picked], weights.query[heads])
    values = torch.einsum("kse,ked->ksd", row.values[picked], weights.output[heads])
    rest = torch.where(left_out(pattern.shape[1], sources), pattern, 0.0)
    other = torch.einsum("ks,kse,ked->kd", rest, row.values[heads], weights.output[heads])
    for i, head in enumerate(heads.tolist()):
        total = Node(NodeKind.HEAD_OUTPUT, flow.position, flow.layer, head=head)
        places = (row.first + sources[i]).tolist()
        key_ids = flow.nodes(_memories(flow, NodeKind.MEMORY_KEY, head, places), keys[i])
        value_ids = flow.nodes(_memories(flow, NodeKind.MEMORY_VALUE, head, places), values[i])
        attended = probability[i]
        asked = [head_queries[i]] * len(key_ids)
        flow.edges(EdgeKind.ATTEND, asked, key_ids, attended, attended)
        flow.edges(EdgeKind.RECALL, key_ids, value_ids, attended, attended)
        recalled = attended[:, None] * values[i]
        flow.parts(value_ids, head_outputs[i], recalled, outputs[head], attended)
        if sources.shape[1] < pattern.shape[1]:
            left = flow.other(total, other[i])
            flow.parts([left], head_outputs[i], other[i][None], outputs[head], rest[i].sum()[None])


def _memories(flow: FlowBuilder, kind: NodeKind, head: int, sources: list[int]) -> list[Node]:
    return [
        Node(kind, flow.position, flow.layer, head=head, source_position=source)
        for source in sources
    ]


def _add_concat(
    flow: FlowBuilder, head_outputs: list[str], outputs: torch.Tensor, heads: torch.Tensor
) -> str:
    """All heads together: a junction of the graph, without a reading of its own."""
    total = outputs.sum(0)
    concat = flow.node(NodeKind.ATTENTION_CONCAT, total, projected=False)
    flow.parts(head_outputs, concat, outputs[heads], total)
    if len(heads) < len(outputs):
        rest = outputs[left_out(len(outputs), heads)].sum(0)
        junction = Node(NodeKind.ATTENTION_CONCAT, flow.position, flow.layer)
        flow.parts([flow.other(junction, rest)], concat, rest[None], total)
    return concat


def _add_result(
    flow: FlowBuilder,
    concat: str,
    row: HeadRow,
    weights: AttentionWeights,
    selection: Selection,
    result: Result,
) -> str:
    """Rows of W_O with their activations, the bias, and what they add up to."""
    activations = row.concat.flatten()
    terms = WeightedRows(activations, weights.output.flatten(0, 1), weights.row_norms, weights.bias)
    added = add_weighted_rows(flow, terms, ATTENTION_KINDS, selection, result)
    flow.edges(
        EdgeKind.ACTIVATE, [concat] * len(added.neurons), added.neurons, activations[added.picked]
    )
    return added.total

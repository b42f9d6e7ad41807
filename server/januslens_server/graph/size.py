"""How many nodes a flow graph has, before it is built."""

from __future__ import annotations

from collections.abc import Mapping

from januslens_server.results import ModelFacts, NodeKind
from januslens_server.specs import Selection

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
    """Upper bounds by kind for one block at a position that sees `sources` positions."""
    heads = _picked(selection.heads, facts.n_heads)
    memories = heads * _picked(selection.memory_values_per_head, sources)
    neurons = _neurons(selection, facts.d_mlp * max(1, facts.n_experts))
    return {
        **dict.fromkeys(_ONE_EACH, 1),
        **dict.fromkeys(_PER_HEAD, heads),
        **dict.fromkeys(_PER_NEURON, neurons),
        NodeKind.MEMORY_KEY: memories,
        NodeKind.MEMORY_VALUE: memories,
        NodeKind.ATTENTION_NEURON: _neurons(selection, facts.n_heads * facts.d_head),
        NodeKind.OTHER: heads + 3,  # of each head's sources, of the heads, of both sums of rows
    }


def _neurons(selection: Selection, width: int) -> int:
    return min(_picked(selection.top_neurons, width) + selection.bottom_neurons, width)


def _picked(count: int, available: int) -> int:
    return min(count, available) if count else available

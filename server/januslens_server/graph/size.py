"""How many nodes a flow graph has, before it is built."""

from __future__ import annotations

from januslens_server.results import ModelFacts
from januslens_server.specs import Selection


def block_nodes(facts: ModelFacts, selection: Selection, sources: int) -> int:
    """An upper bound of the nodes of one block at a position that sees `sources` positions."""
    heads = _picked(selection.heads, facts.n_heads)
    memories = _picked(selection.memory_values_per_head, sources)
    # Each head: query, key, value, output, the rest of its sources, and per memory key and value.
    attention = 3 + heads * (5 + 2 * memories)
    written = (
        _neurons(selection, facts.n_heads * facts.d_head) + _neurons(selection, facts.d_mlp) * 3
    )
    # Norms, junctions, sums, biases, residuals, and the rest of each sum.
    return attention + written + 16


def _neurons(selection: Selection, width: int) -> int:
    return min(_picked(selection.top_neurons, width) + selection.bottom_neurons, width)


def _picked(count: int, available: int) -> int:
    return min(count, available) if count else available

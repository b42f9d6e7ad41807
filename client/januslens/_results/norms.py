"""Layer norms as semantic filters: which tokens a norm takes from the top and which it lifts.

VISIT (Katz & Belinkov, 2023) found that a norm changes what a vector says in the vocabulary, not
only its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from januslens._results.graph import GraphView
from januslens._results.kinds import EdgeKind
from januslens._results.nodes import Node
from januslens._results.tokens import Token


@dataclass(frozen=True, slots=True)
class NormEffect:
    """What a norm did to the top tokens of a vector.

    Attributes:
        before: The node that the norm reads.
        after: The node that it makes.
        removed: Top tokens before that are not among the top after, best first.
        kept: Top tokens before that are, best first.
        added: Top tokens after that were not among the top before, best first.
        overlap: Share of the top tokens kept: VISIT's intersection score.
    """

    before: Node
    after: Node
    removed: tuple[Token, ...]
    kept: tuple[Token, ...]
    added: tuple[Token, ...]
    overlap: float


def norm_effects(graph: GraphView) -> list[NormEffect]:
    """The effect of every norm between two nodes that both have a projection."""
    return list(_effects(graph))


def _effects(graph: GraphView) -> Iterator[NormEffect]:
    for edge in graph.edge_list:
        if edge.kind is not EdgeKind.NORM:
            continue
        before, after = graph.node(edge.source), graph.node(edge.target)
        if before.projection and after.projection and before.projection.top:
            yield _effect(before, after, before.projection.top_tokens, after.projection.top_tokens)


def _effect(
    before: Node, after: Node, tops: tuple[Token, ...], tops_after: tuple[Token, ...]
) -> NormEffect:
    kept = tuple(token for token in tops if token in tops_after)
    return NormEffect(
        before=before,
        after=after,
        removed=tuple(token for token in tops if token not in tops_after),
        kept=kept,
        added=tuple(token for token in tops_after if token not in tops),
        overlap=len(kept) / len(tops),
    )

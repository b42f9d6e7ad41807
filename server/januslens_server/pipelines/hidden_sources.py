"""Refuse blocks of attention that leave a query position without any source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from januslens_server.errors import CancelCheck, InvalidRequest
from januslens_server.graph.weights import Scoring
from januslens_server.models.interventions import Intervention
from januslens_server.models.resident import ResidentModel
from januslens_server.models.sites import SiteKey
from januslens_server.specs import Site


@dataclass(frozen=True, eq=False)
class Block:
    """An intervention that hides sources; `field` is its path in the request."""

    field: str
    keys: frozenset[SiteKey]
    heads: frozenset[int] | None
    positions: frozenset[int]
    hidden: NDArray[np.int64]

    def applies(self, layer: int, head: int) -> bool:
        """Whether a head of a layer is blocked."""
        return (layer, Site.ATTENTION_PATTERN) in self.keys and (
            self.heads is None or head in self.heads
        )


def blocks_of(interventions: Iterable[tuple[str, Intervention]]) -> list[Block]:
    """Return those of the interventions, each with its path in the request, that hide sources."""
    return [
        Block(
            field,
            frozenset(found.keys),
            None if found.units is None else frozenset(found.units),
            frozenset(found.positions),
            np.array(found.hidden),
        )
        for field, found in interventions
        if found.hidden
    ]


def check_sources_left(
    model: ResidentModel,
    blocks: Sequence[Block],
    check_cancelled: CancelCheck,
    always: Sequence[Block] = (),
) -> None:
    """Raise `InvalidRequest` if a query position has no source left in a head.

    `always` are blocks that apply together with `blocks` and have been checked before.
    """
    if not blocks:
        return
    together = [*always, *blocks]
    checked: set[tuple[frozenset[Block], int | None, int | None]] = set()
    for layer, view in model.view.known.items():
        if view.attention is None:
            continue
        scoring = view.attention.scoring
        for head in range(view.attention.n_heads):
            chosen = frozenset(block for block in together if block.applies(layer, head))
            reach = (chosen, scoring.window, scoring.chunk)
            if chosen.isdisjoint(blocks) or reach in checked:
                continue
            checked.add(reach)
            check_cancelled()
            for position, last in _without_sources([b for b in together if b in chosen], scoring):
                raise InvalidRequest(
                    f"{last.field}.source_positions",
                    f"position {position} would have no source left in layer {layer}, "
                    f"head {head}; leave at least one",
                )


def _without_sources(blocks: Sequence[Block], scoring: Scoring) -> Iterator[tuple[int, Block]]:
    """Yield the query positions that have no source left, with the last block that hides one.

    All blocks together, wherever they apply, hide at least as much as those of one position. So
    only the positions without a source in this union are examined one by one.
    """
    length = 1 + max(max(block.positions) for block in blocks)
    first = np.array([scoring.first_source(position) for position in range(length)])
    positions = np.arange(length)

    @cache
    def nothing_left(together: frozenset[Block]) -> NDArray[np.bool_]:
        """Whether each position would have no source, if all these blocks applied to it."""
        hidden = np.zeros(length + 1, dtype=np.int64)
        for block in together:
            hidden[1 + block.hidden[block.hidden < length]] = 1
        below = hidden.cumsum()
        left: NDArray[np.bool_] = below[positions + 1] - below[first] == positions + 1 - first
        return left

    suspects = set(np.flatnonzero(nothing_left(frozenset(blocks))).tolist())
    at: dict[int, list[Block]] = {}
    for block in blocks if suspects else ():
        for position in suspects & block.positions:
            at.setdefault(position, []).append(block)
    for position, together in sorted(at.items(), key=lambda entry: entry[0]):
        if nothing_left(frozenset(together))[position]:
            yield position, together[-1]

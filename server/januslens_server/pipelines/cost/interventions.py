"""Count what the interventions of a request add to its demand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import NamedTuple

from januslens_server.models.interventions import (
    DRAWN_AT_ONCE,
    PATTERN_AT_ONCE,
    ROUND,
    Intervention,
)
from januslens_server.models.resident import CostSizes, ResidentModel, cost_sizes
from januslens_server.models.sites import SiteKey, site_shape
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.demand import FORWARD, Demand, pass_flops
from januslens_server.specs import Noise, Site

# Changed values that take as long as one attention probability that is computed again.
PER_PROBABILITY = 3


class Changes(NamedTuple):
    """The work of applying interventions.

    `applied` counts the changes of single sites, `values` the values that they change or copy,
    `drawn` those of noise, and `flops` the operations of attention that is computed again.
    """

    applied: int = 0
    values: int = 0
    drawn: int = 0
    flops: float = 0.0

    def plus(self, other: Changes, times: int = 1) -> Changes:
        """Add another count, several times."""
        return Changes(
            self.applied + times * other.applied,
            self.values + times * other.values,
            self.drawn + times * other.drawn,
            self.flops + times * other.flops,
        )


class ChangeCounter:
    """Counts the changes of passes over one prompt."""

    def __init__(self, model: ResidentModel, tokens: int) -> None:
        """`tokens` is the length of the prompt."""
        self._sizes = cost_sizes(model)
        self._tokens = tokens

        @cache
        def shape(key: SiteKey) -> tuple[int, ...]:
            return site_shape(model, key, tokens)

        self._shape = shape

    def of(self, interventions: Iterable[Intervention], from_layer: int = -1) -> Changes:
        """Count the changes in layers from `from_layer` on, of one pass."""
        total = Changes()
        copied: set[SiteKey] = set()
        for found in interventions:
            for key in found.keys:
                if key[0] >= from_layer:
                    total = total.plus(self._one(found, key))
                    copied.add(key)
        values = sum(self._tokens * prod(self._shape(key)) for key in copied if not _blocks(key))
        return total.plus(Changes(values=values))

    def _one(self, found: Intervention, key: SiteKey) -> Changes:
        shape, positions = self._shape(key), len(found.positions)
        if _blocks(key):
            probabilities = positions * prod(shape)
            products = 4.0 * probabilities * self._sizes.facts.d_head
            return Changes(1, PER_PROBABILITY * probabilities, 0, products)
        size = prod(shape)
        drawn = 0
        if isinstance(found.operation, Noise):
            rows = ROUND * (max(found.positions) // ROUND + 1)
            drawn = size * min(self._tokens, rows)
        return Changes(1, positions * prod(found.shape(shape)), drawn)


def _blocks(key: SiteKey) -> bool:
    return key[1] is Site.ATTENTION_PATTERN


def working_bytes(
    sizes: CostSizes, interventions: Iterable[Intervention], tokens: int, copies: int = 1
) -> int:
    """Return the bytes that applying interventions needs at a time, for copies of a prompt."""
    facts = sizes.facts
    widest = max(facts.d_mlp, facts.n_heads * facts.d_head, facts.stream_width)
    changes = list(interventions)
    total = 4 * memory.FLOAT32 * tokens * copies * widest if changes else 0
    if any(isinstance(found.operation, Noise) for found in changes):
        # Noise is drawn for the neurons of all experts at once.
        of_experts = any(found.experts is not None for found in changes)
        drawn = tokens * widest * (max(1, facts.n_experts) if of_experts else 1)
        total += memory.FLOAT32 * (min(DRAWN_AT_ONCE, drawn) + 3 * drawn)
    if any(found.hidden for found in changes):
        row = facts.n_heads * tokens
        total += 5 * memory.FLOAT32 * min(row * tokens, max(row, PATTERN_AT_ONCE))
    return total


def with_interventions(
    demand: Demand,
    model: ResidentModel,
    interventions: Sequence[Intervention],
    tokens: int,
    *,
    backward: bool = False,
) -> Demand:
    """Add the passes of other prompts, their values, and the changes of one pass.

    With `backward`, the pass keeps what its gradients need of the changes.
    """
    if not interventions:
        return demand
    sizes = cost_sizes(model)
    others = {source.ids for found in interventions for source in found.sources}
    taken = 0
    for found in interventions:
        for key in found.keys if found.sources else ():
            size = prod(site_shape(model, key, tokens))
            kept = sum(len(source.positions) for source in found.sources)
            taken += sizes.item * size * (kept + len(found.positions))
    longest = max((len(ids) for ids in others), default=1)
    changes = ChangeCounter(model, tokens).of(interventions)
    kept_for_backward = 2 * memory.FLOAT32 * changes.values if backward else 0
    return replace(
        demand,
        passes=demand.passes + FORWARD * len(others),
        flops=demand.flops + sum(pass_flops(sizes, len(ids)) for ids in others) + changes.flops,
        changes=demand.changes + changes.applied,
        changed=demand.changed + changes.values,
        drawn=demand.drawn + changes.drawn,
        memory=demand.memory
        + taken
        + working_bytes(sizes, interventions, tokens)
        + kept_for_backward
        + (memory.passing(sizes, longest, 1) if others else 0),
        held=demand.held + taken,
    )

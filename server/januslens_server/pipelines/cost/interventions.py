"""Compute what the interventions of a request add to its demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from januslens_server.models.interventions import Intervention
from januslens_server.models.resident import ResidentModel, cost_sizes
from januslens_server.models.sites import site_shape
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.demand import FORWARD, Demand, pass_flops
from januslens_server.specs import Site


def with_interventions(
    demand: Demand, model: ResidentModel, interventions: Sequence[Intervention], tokens: int
) -> Demand:
    """Add the passes of other prompts, their values, and attention that is computed again."""
    if not interventions:
        return demand
    sizes = cost_sizes(model)
    facts = sizes.facts
    others = {source.ids for found in interventions for source in found.sources}
    values = longest = 0
    for found in interventions:
        for key in found.keys:
            size = prod(site_shape(model, key, tokens)) if found.sources else 0
            kept = sum(len(source.positions) for source in found.sources)
            values += sizes.item * size * (kept + len(found.positions))
    longest = max((len(ids) for ids in others), default=1)
    blocked = {layer for f in interventions for layer, s in f.keys if s is Site.ATTENTION_PATTERN}
    products = 4.0 * tokens * tokens * facts.n_heads * facts.d_head
    pattern = memory.FLOAT32 * facts.n_heads * tokens * tokens if blocked else 0
    widest = max(facts.d_mlp, facts.n_heads * facts.d_head, facts.d_model)
    changed = 4 * memory.FLOAT32 * tokens * widest
    return replace(
        demand,
        passes=demand.passes + FORWARD * len(others),
        flops=demand.flops
        + sum(pass_flops(sizes, len(ids)) for ids in others)
        + len(blocked) * products,
        memory=demand.memory
        + values
        + changed
        + 5 * pattern
        + (memory.passing(sizes, longest, 1) if others else 0),
        held=demand.held + values,
    )

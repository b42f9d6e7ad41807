"""Compute the demand of an Intervene."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from itertools import chain
from math import prod

from januslens_server.models.resident import cost_sizes
from januslens_server.models.sites import site_shape
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.demand import (
    ENVELOPE_BYTES,
    FORWARD,
    TOKEN_BYTES,
    Demand,
    pass_flops,
    texts_bytes,
)
from januslens_server.pipelines.cost.interventions import ChangeCounter, working_bytes
from januslens_server.pipelines.intervene import batches, first_changed
from januslens_server.pipelines.resolve import ResolvedIntervene

# Bytes of an outcome or effect without its tokens, and of a listed token.
OUTCOME_BYTES, LISTED_BYTES = 48, 9


def intervene_demand(request: ResolvedIntervene) -> Demand:
    """Return the demand of the passes before and of all experiments, and of their effects."""
    sizes, tokens = cost_sizes(request.model), len(request.tokens)
    facts, read = sizes.facts, len(request.positions)
    one, blocks = pass_flops(sizes, tokens, read), pass_flops(sizes, tokens, 0)
    share: Counter[int] = Counter()
    counter = ChangeCounter(request.model, tokens)
    of_all = cache(partial(counter.of, request.always))
    changes = of_all(-1)
    for lowest, members in batches(request):
        share[lowest] += len(members)
        start = first_changed(lowest)
        changes = changes.plus(of_all(start), len(members))
        for _, experiment in members:
            changes = changes.plus(counter.of(experiment.interventions, start))
    layers = facts.n_layers
    flops = sum(count * (one - blocks * low / layers) for low, count in share.items())
    others: set[tuple[int, ...]] = set()
    values = 0
    for found in (*request.always, *(i for e in request.experiments for i in e.interventions)):
        others |= {source.ids for source in found.sources}
        if not found.sources:
            continue
        size = sum(prod(site_shape(request.model, k, tokens)) for k in found.keys[:1])
        kept = sum(len(source.positions) for source in found.sources)
        values += sizes.item * size * len(found.keys) * kept
    longest = max((len(ids) for ids in others), default=1)
    together = min(request.at_once, len(request.experiments))
    own = (found for experiment in request.experiments for found in experiment.interventions)
    applying = working_bytes(sizes, chain(request.always, own), tokens, together)
    held = values + sizes.item * layers * tokens * facts.stream_width
    held += 2 * memory.FLOAT32 * read * facts.vocab_size
    logits = 8 * memory.FLOAT32 * read * facts.vocab_size
    working = memory.passing(sizes, max(tokens * together, longest), read * together)
    listed = read * (OUTCOME_BYTES + LISTED_BYTES * request.spec.top_k)
    named = (1 + len(request.experiments)) * read * request.spec.top_k
    return Demand(
        passes=FORWARD * (2 + len(others) + sum(1 for _ in batches(request))),
        flops=2 * one + flops + changes.flops + sum(pass_flops(sizes, len(ids)) for ids in others),
        changes=changes.applied,
        changed=changes.values,
        drawn=changes.drawn,
        memory=held + working + logits + applying,
        stream=(1 + len(request.experiments)) * (listed + OUTCOME_BYTES)
        + sum(len(e.label.encode()) for e in request.experiments)
        + tokens * TOKEN_BYTES
        + 2 * ENVELOPE_BYTES
        + texts_bytes(sizes, named),
        held=held,
    )

"""Compute the demand of a Generate."""

from __future__ import annotations

from januslens_server.models.decoding import rotation_changes
from januslens_server.models.resident import CostSizes, cost_sizes
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.demand import (
    TOKEN_BYTES,
    Demand,
    lens_flops,
    pass_flops,
    reading_bytes,
    texts_bytes,
)
from januslens_server.pipelines.cost.interventions import with_interventions
from januslens_server.pipelines.resolve import ResolvedGenerate
from januslens_server.specs import Site


def generate_demand(request: ResolvedGenerate) -> Demand:
    """Return the demand of the prompt's pass, of one pass per new token, and of the readings."""
    spec, sizes = request.spec, cost_sizes(request.model)
    facts, prompt, new = sizes.facts, len(request.tokens), request.max_new_tokens
    listed = 0 if spec.reading is None else spec.reading.top_k
    vectors = new * len(request.layers)
    # Keys and values at all positions; a growing cache is copied, one layer at a time.
    position = 2 * facts.n_kv_heads * facts.d_head * sizes.item
    cached = request.model.view.cache_argument is not None
    cache = (facts.n_layers + 2) * position * (prompt + new) if cached else 0
    flops = pass_flops(sizes, prompt) + _later_passes(sizes, prompt, new, cached)
    # Where its rotation changes, a model with LongRoPE runs the whole sequence once more.
    changes = rotation_changes(request.model.network.config) if cached else ()
    repeated = [length + 1 for length in changes if prompt <= length < prompt + new - 1]
    flops += sum(pass_flops(sizes, length) for length in repeated)
    longest = max([prompt if cached else prompt + new, *repeated])
    step = memory.FLOAT32 * 6 * facts.vocab_size + memory.read(sizes, len(request.layers), listed)
    named = new * (1 + spec.top_k + listed * len(request.layers))
    # Layers that hide sources from generated tokens keep their keys and values once more, and each
    # step computes their attention again in float32.
    hiding = {
        layer
        for found in request.interventions
        for layer, site in found.keys
        if site is Site.ATTENTION_PATTERN and found.throughout
    }
    cache += len(hiding) * position * (prompt + new)
    again = 4.0 * len(hiding) * facts.n_heads * facts.d_head * new * (prompt + new)
    if hiding:
        step += 4 * memory.FLOAT32 * facts.n_heads * (facts.d_head + 1) * (prompt + new)
    own = Demand(
        passes=new,
        flops=flops + again + lens_flops(sizes, vectors),
        vectors=vectors,
        readings=new if request.layers else 0,
        ranks=vectors,
        memory=cache + memory.passing(sizes, longest, 1) + step,
        stream=TOKEN_BYTES * prompt
        + new * (64 + reading_bytes(spec.top_k))
        + vectors * (16 + 4 * listed)
        + texts_bytes(sizes, named),
        held=cache,
        generated=new,
    )
    return with_interventions(own, request.model, request.interventions, prompt)


def _later_passes(sizes: CostSizes, prompt: int, new: int, cached: bool) -> float:
    """Return the operations of the passes after the prompt's.

    With a cache, each runs one token, which attends to all positions before it. Without, each runs
    the whole sequence; the mean of a quadratic is that of its ends and four times its middle.
    """
    if cached:
        facts = sizes.facts
        attended = 4.0 * facts.n_layers * facts.n_heads * facts.d_head * new * (prompt + new)
        return (new - 1) * pass_flops(sizes, 1) + attended
    first, last = (pass_flops(sizes, length) for length in (prompt + 1, prompt + new - 1))
    middle = pass_flops(sizes, prompt + new // 2)
    return (new - 1) * (first + 4 * middle + last) / 6

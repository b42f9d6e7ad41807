"""Compute the demand of a Generate."""

from __future__ import annotations

from januslens_server.models.resident import cost_sizes
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
    cache = (facts.n_layers + 2) * position * (prompt + new)
    single = pass_flops(sizes, 1)
    # Each new token also attends to all positions before it.
    attended = 4.0 * facts.n_layers * facts.n_heads * facts.d_head * new * (prompt + new)
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
        flops=pass_flops(sizes, prompt)
        + (new - 1) * single
        + attended
        + again
        + lens_flops(sizes, vectors),
        vectors=vectors,
        readings=new if request.layers else 0,
        ranks=vectors,
        memory=cache + memory.passing(sizes, prompt, 1) + step,
        stream=TOKEN_BYTES * prompt
        + new * (64 + reading_bytes(spec.top_k))
        + vectors * (16 + 4 * listed)
        + texts_bytes(sizes, named),
        held=cache,
        generated=new,
    )
    return with_interventions(own, request.model, request.interventions, prompt)

"""Compute the demand of an Activations request."""

from __future__ import annotations

from januslens_server.models.resident import cost_sizes
from januslens_server.models.sites import site_experts
from januslens_server.pipelines.activations import STEP_BYTES
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.demand import (
    ENVELOPE_BYTES,
    FORWARD,
    TOKEN_BYTES,
    Demand,
    pass_flops,
)
from januslens_server.pipelines.resolve import ResolvedActivations
from januslens_server.specs import Site

# Bytes of a message besides its values, and the smallest number of bytes of values in a message
# that is not the last of its tensor.
MESSAGE_BYTES, PIECE_BYTES = 128, 512 * 1024


def activations_demand(request: ResolvedActivations) -> Demand:
    """Return the demand of one pass, and of keeping and sending the values."""
    sizes, tokens = cost_sizes(request.model), len(request.tokens)
    positions, facts = len(request.positions), sizes.facts
    patterns = [key for key in request.keys if key[1] is Site.ATTENTION_PATTERN]
    scored = positions if any(site is Site.LOGITS for _, site in request.keys) else 1
    heads = facts.d_head * (positions * facts.n_heads + tokens * facts.n_kv_heads)
    held = sizes.item * len(patterns) * heads
    sent = 0
    for key in request.keys:
        count = positions * request.sizes[key]
        pattern, mixture = key[1] is Site.ATTENTION_PATTERN, site_experts(request.model, key)
        own = memory.FLOAT32 if pattern or mixture or request.spec.float32 else sizes.item
        sent += count * own + MESSAGE_BYTES * (2 + count * own // PIECE_BYTES)
        held += 0 if pattern else (memory.FLOAT32 if mixture else sizes.item) * count
    rows = max(STEP_BYTES, memory.FLOAT32 * facts.n_heads * tokens if patterns else 0)
    turned = memory.FLOAT32 * 4 * tokens * facts.n_heads * facts.d_head if patterns else 0
    products = 2.0 * positions * tokens * facts.n_heads * facts.d_head
    return Demand(
        passes=FORWARD,
        flops=pass_flops(sizes, tokens, scored) + len(patterns) * products,
        memory=held + max(memory.passing(sizes, tokens, scored), 6 * rows + turned),
        stream=sent + tokens * TOKEN_BYTES + 4 * positions + 2 * ENVELOPE_BYTES,
        held=held + sizes.item * scored * facts.vocab_size,
    )

"""Bytes that a request needs on the device beside the weights: upper bounds.

What is counted: what a pass captures or keeps for its backward, its logits, the largest temporary,
and the lens' chunk. The factors are what one block of a GPT-2, Llama or mixture was seen to hold at
once, rounded up (tests/numerics/test_cost.py measures them).
"""

from __future__ import annotations

from januslens_server.models.resident import CostSizes

FLOAT32 = 4
# Queries whose mask attention brings to float32 at once, at most.
MASK_ROWS = 2048


def captured(sizes: CostSizes, tokens: int, positions: int) -> int:
    """Of one block, by a pass that a Trace looks into at so many of the prompt's positions."""
    facts = sizes.facts
    heads = 2 * facts.n_heads * facts.d_head
    at_each = 10 * facts.d_model + heads + _neurons(sizes)
    return sizes.item * (positions * at_each + 2 * tokens * facts.n_kv_heads * facts.d_head)


def kept_for_backward(sizes: CostSizes, tokens: int) -> int:
    """Of one block, by autograd and for the factors."""
    facts = sizes.facts
    heads = (8 * facts.n_heads + 6 * facts.n_kv_heads) * facts.d_head
    scores = 4 * facts.n_heads * tokens if sizes.eager else 0
    return sizes.item * tokens * (16 * facts.d_model + heads + 6 * _neurons(sizes) + scores)


def passing(sizes: CostSizes, tokens: int, scored: int) -> int:
    """The largest temporary of a forward pass, its masks, residual and `scored` logits."""
    facts = sizes.facts
    scores = 3 * facts.n_heads * tokens if sizes.eager else 0
    width = 6 * facts.d_model + 4 * facts.n_heads * facts.d_head + 4 * _neurons(sizes) + scores
    masks = 3 * tokens * tokens + 2 * FLOAT32 * tokens * min(tokens, MASK_ROWS)
    return sizes.item * (tokens * width + 3 * scored * facts.vocab_size) + masks


def read(sizes: CostSizes, vectors: int, listed: int) -> int:
    """The lens over so many vectors: a chunk's logits several times over, and what is reported."""
    facts = sizes.facts
    row = FLOAT32 * facts.vocab_size
    chunk = min(max(sizes.chunk_bytes, row), row * vectors)
    return 5 * chunk + vectors * 4 * FLOAT32 * facts.d_model + reported(vectors, listed)


def reported(vectors: int, listed: int) -> int:
    """Bytes of the readings of a number of vectors."""
    return vectors * 40 * (listed + 4)


def float_copies(sizes: CostSizes) -> int:
    """One block's weights in float32, where they are not."""
    return 0 if sizes.item == FLOAT32 else FLOAT32 * sizes.block


def _neurons(sizes: CostSizes) -> int:
    return sizes.facts.d_mlp * max(1, sizes.facts.n_experts)

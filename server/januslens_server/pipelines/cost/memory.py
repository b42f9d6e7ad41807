"""Upper bounds of the bytes that a request needs on the device, without the weights.

They include captured activations, those kept for the backward pass, logits, the largest temporary
tensor, and a chunk of the lens. The constant factors were measured on single blocks of GPT-2, Llama
and a mixture, and rounded up (tests/numerics/test_cost.py).
"""

from __future__ import annotations

from januslens_server.models.resident import CostSizes

FLOAT32 = 4
# Maximum number of queries for which attention converts the mask to float32 at once.
MASK_ROWS = 2048


def captured(sizes: CostSizes, tokens: int, positions: int) -> int:
    """Return the bytes that a Trace captures of one block, for a number of positions."""
    facts = sizes.facts
    heads = 2 * facts.n_heads * facts.d_head
    at_each = 10 * facts.stream_width + heads + _neurons(sizes)
    return sizes.item * (positions * at_each + 2 * tokens * facts.n_kv_heads * facts.d_head)


def kept_for_backward(sizes: CostSizes, tokens: int) -> int:
    """Return the bytes that one block keeps for the backward pass and the factors."""
    facts = sizes.facts
    heads = (8 * facts.n_heads + 6 * facts.n_kv_heads) * facts.d_head
    scores = 4 * facts.n_heads * tokens if sizes.eager else 0
    each = 16 * facts.stream_width + heads + 6 * _neurons(sizes) + scores
    return sizes.item * tokens * each + _scan(sizes, tokens)


def passing(sizes: CostSizes, tokens: int, scored: int) -> int:
    """Return the bytes of a forward pass: largest temporary tensor, masks, `scored` logits."""
    facts = sizes.facts
    scores = 3 * facts.n_heads * tokens if sizes.eager else 0
    width = 6 * facts.stream_width + 4 * facts.n_heads * facts.d_head + 4 * _neurons(sizes) + scores
    masks = 3 * tokens * tokens + 2 * FLOAT32 * tokens * min(tokens, MASK_ROWS)
    temporary = sizes.item * (tokens * width + 3 * scored * facts.vocab_size)
    return temporary + masks + _scan(sizes, tokens)


def read(sizes: CostSizes, vectors: int, listed: int) -> int:
    """Return the bytes of projecting vectors: a chunk's logits, tensors of its parts, results."""
    facts = sizes.facts
    row = FLOAT32 * facts.vocab_size
    chunk = min(max(sizes.chunk_bytes, row), row * vectors)
    # Differences from the largest logit, their exponentials and capped logits, or what is listed.
    parts = (4 if listed else 3) * min(chunk, sizes.part_bytes)
    return chunk + parts + vectors * 4 * FLOAT32 * facts.stream_width + reported(vectors, listed)


def reported(vectors: int, listed: int) -> int:
    """Return the bytes of the projections of a number of vectors."""
    return vectors * 40 * (listed + 4)


def float_copies(sizes: CostSizes) -> int:
    """Return the bytes of a float32 copy of one block's weights; 0 if they are float32."""
    return 0 if sizes.item == FLOAT32 else FLOAT32 * sizes.block


def _scan(sizes: CostSizes, tokens: int) -> int:
    """Return the bytes of the largest scan of a mixer."""
    return FLOAT32 * max((scan.values * scan.padded(tokens) for scan in sizes.scans), default=0)


def _neurons(sizes: CostSizes) -> int:
    return max(sizes.widest, sizes.facts.d_mlp * max(1, sizes.facts.n_experts))

"""The work that a request asks for and the bytes of its answer, counted from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from januslens_server.models.resident import CostSizes

# A backward pass through activations alone: about what the forward takes, and the loss's logits.
FORWARD, BACKWARD = 1, 2


@dataclass(frozen=True)
class Demand:
    """Upper bounds of the work: counts, and bytes of `memory` on the device and of the `stream`.

    `held` of the memory is kept between two steps of the request.
    `passes` are walks through the blocks, `flops` their floating-point operations and those of
    other large products; `blocks` are taken apart for the flow graph, each at a position, `nodes`
    built for it, `vectors` read through the lens in `readings` calls of it, which also find `ranks`
    of target tokens.
    """

    passes: int = 0
    flops: float = 0.0
    blocks: int = 0
    nodes: int = 0
    vectors: int = 0
    readings: int = 0
    ranks: int = 0
    memory: int = 0
    stream: int = 0
    held: int = 0


def pass_flops(sizes: CostSizes, tokens: int, scored: int = 1) -> float:
    """One forward pass: two operations a weight and token, attention over all pairs, the head.

    The head gives logits at `scored` positions.
    """
    facts = sizes.facts
    attention = 4.0 * facts.n_layers * tokens * tokens * facts.n_heads * facts.d_head
    head = 2.0 * facts.d_model * facts.vocab_size * scored
    return 2.0 * sizes.passed * tokens + attention + head


def lens_flops(sizes: CostSizes, vectors: int) -> float:
    """The unembedding of so many vectors."""
    return 2.0 * sizes.facts.d_model * sizes.facts.vocab_size * vectors


# Of a node without its reading, an edge, and a token with its text and bytes.
NODE_BYTES = 72
EDGE_BYTES = 96
TOKEN_BYTES = 40

# Of a response's header or summary: provenance, stage times, checks.
ENVELOPE_BYTES = 2048


def reading_bytes(listed: int) -> int:
    """A projection that lists so many tokens: id, probability and logit each."""
    return 32 + 11 * listed


def texts_bytes(sizes: CostSizes, named: int) -> int:
    """The texts of the tokens that readings name, each once."""
    return ENVELOPE_BYTES + TOKEN_BYTES * min(named, sizes.facts.vocab_size)

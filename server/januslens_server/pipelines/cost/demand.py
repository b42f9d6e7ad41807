"""Count the work of a request and the bytes of its response, from the model's sizes."""

from __future__ import annotations

from dataclasses import dataclass

from januslens_server.models.resident import CostSizes

# Cost in forward passes. A backward pass computes gradients of activations only, which takes about
# as long as a forward pass; the second unit covers the logits of the loss.
FORWARD, BACKWARD = 1, 2


@dataclass(frozen=True)
class Demand:
    """Upper bounds of the work of a request.

    Attributes:
        passes: Passes through the blocks; a backward pass counts as `BACKWARD`.
        flops: Floating-point operations of the passes and of other large products.
        flows: Flow graphs to build, of a block at one position or of its states at several.
        nodes: Nodes of these graphs.
        read: Those of the nodes that are projected.
        vectors: Vectors to project, including those of nodes.
        readings: Calls of the lens that project them.
        ranks: Ranks of target tokens to compute.
        memory: Bytes on the device, without the weights.
        stream: Bytes of the response.
        held: Bytes of `memory` that stay in use between two steps of the request.
        generated: Tokens to generate.
        changes: Changes of single sites by interventions.
        changed: Values that interventions change or copy.
        drawn: Normal values that are drawn for noise.
    """

    passes: int = 0
    flops: float = 0.0
    flows: int = 0
    nodes: int = 0
    read: int = 0
    vectors: int = 0
    readings: int = 0
    ranks: int = 0
    memory: int = 0
    stream: int = 0
    held: int = 0
    generated: int = 0
    changes: int = 0
    changed: int = 0
    drawn: int = 0


def pass_flops(sizes: CostSizes, tokens: int, scored: int = 1) -> float:
    """Return the floating-point operations of one forward pass with logits at `scored` positions.

    These are two operations per weight and token, attention over all pairs of tokens, scans of
    mixers, and the output head.
    """
    facts = sizes.facts
    attention = 4.0 * facts.n_layers * tokens * tokens * facts.n_heads * facts.d_head
    head = 2.0 * facts.d_model * facts.vocab_size * scored
    scans = float(sum(scan.flops * scan.padded(tokens) for scan in sizes.scans))
    return 2.0 * sizes.passed * tokens + attention + scans + head


def lens_flops(sizes: CostSizes, vectors: int) -> float:
    """Return the floating-point operations of unembedding this many vectors."""
    return 2.0 * sizes.facts.d_model * sizes.facts.vocab_size * vectors


# Bytes of a node without its projection, of an edge, and of a token with its text and bytes.
NODE_BYTES = 72
EDGE_BYTES = 96
TOKEN_BYTES = 40

# Bytes of a header or summary: provenance, stage times, checks.
ENVELOPE_BYTES = 2048


def reading_bytes(listed: int) -> int:
    """Return the bytes of a projection with `listed` tokens: id, probability and logit of each."""
    return 32 + 11 * listed


def texts_bytes(sizes: CostSizes, named: int) -> int:
    """Return the bytes of the texts of `named` tokens, at most one per vocabulary entry."""
    return ENVELOPE_BYTES + TOKEN_BYTES * min(named, sizes.facts.vocab_size)

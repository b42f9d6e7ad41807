"""Bytes of messages, as protobuf writes them: upper bounds for usual tokens and coordinates."""

from __future__ import annotations

from januslens_server.models.resident import CostSizes

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

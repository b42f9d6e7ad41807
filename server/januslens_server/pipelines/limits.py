"""What one request may ask for."""

from __future__ import annotations

from collections.abc import Sequence

from januslens_server.errors import LimitExceeded
from januslens_server.graph.size import block_nodes
from januslens_server.results import ModelFacts
from januslens_server.specs import TraceSpec

# Raw vectors of one trace, in bytes: about 4,000 positions and layers of GPT-2 small.
MAX_VECTOR_BYTES = 256 * 2**20


def check_vectors(
    facts: ModelFacts, spec: TraceSpec, layers: Sequence[int], positions: Sequence[int]
) -> None:
    """Raise `LimitExceeded` if the raw vectors that are asked for could be too many bytes."""
    if not spec.include_vectors:
        return
    nodes = len(layers) * sum(block_nodes(facts, spec.selection, p + 1) for p in positions)
    size = 4 * facts.d_model * nodes
    if size > MAX_VECTOR_BYTES:
        raise LimitExceeded(
            f"expected at most {MAX_VECTOR_BYTES} bytes of raw vectors, got up to {size} from "
            f"{nodes} nodes; ask for fewer layers, positions or parts, or without include_vectors"
        )

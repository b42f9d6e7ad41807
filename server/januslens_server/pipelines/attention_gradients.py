"""The attention patterns of a GradientLens and their gradients, in pieces of rows.

Source: Reversed Attention (Katz & Wolf, 2025).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from januslens_server.errors import CancelCheck
from januslens_server.graph.weights import attention_gradients
from januslens_server.models.failures import check_gradients
from januslens_server.models.interventions import hidden_sources
from januslens_server.models.runner import AttentionVjp
from januslens_server.pipelines.metrics import StageClock
from januslens_server.pipelines.resolve import ResolvedGradientLens
from januslens_server.results import AttentionGradient
from januslens_server.transfer import to_host

# Bytes of one of the three tensors that a step returns, after which other requests may run.
STEP_BYTES = 2**20


def rows_at_once(n_heads: int, tokens: int) -> int:
    """Return the number of query positions that are computed together."""
    return max(1, STEP_BYTES // (4 * n_heads * tokens))


def pieces(
    request: ResolvedGradientLens,
    layer: int,
    vjp: AttentionVjp,
    clock: StageClock,
    check_cancelled: CancelCheck,
) -> Iterator[AttentionGradient]:
    """Yield the pieces of one layer; `check_cancelled` is called before each.

    Raises `NotFinite` if a gradient is infinite or NaN.
    """
    tokens, n_heads = len(vjp.query), vjp.query.shape[1]
    step = rows_at_once(n_heads, tokens)
    for start in range(0, tokens, step):
        check_cancelled()
        with clock.stage("attention"):
            found = _piece(request, layer, vjp, range(start, min(start + step, tokens)))
        yield found


@torch.inference_mode()
def _piece(
    request: ResolvedGradientLens, layer: int, vjp: AttentionVjp, positions: range
) -> AttentionGradient:
    attention = request.model.view.attention(layer)
    tokens, n_heads = len(vjp.query), vjp.query.shape[1]
    rotation = None
    if attention.rotation is not None:
        rotation = attention.rotation(tokens).to(vjp.query.device)
    rows = slice(positions.start, positions.stop)
    found = attention_gradients(
        vjp.query[rows],
        vjp.key,
        vjp.value,
        vjp.result_gradient[rows],
        positions,
        rotation,
        attention.scoring,
        hidden_sources(request.interventions, layer),
    )
    tensors = (found.pattern, found.of_pattern, found.of_scores)
    check_gradients(tensors)
    return AttentionGradient(
        layer,
        (tokens, n_heads, tokens),
        positions.start * n_heads * tokens,
        *(tensor.numpy() for tensor in to_host(*(own.flatten() for own in tensors))),
    )

"""Compute the demand of a GradientLens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from januslens_server.models.experts import ExpertMatrices
from januslens_server.models.matrices import Linear
from januslens_server.models.resident import CostSizes, ResidentModel, cost_sizes
from januslens_server.pipelines.attention_gradients import STEP_BYTES, rows_at_once
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.demand import (
    BACKWARD,
    FORWARD,
    TOKEN_BYTES,
    Demand,
    lens_flops,
    pass_flops,
    reading_bytes,
    texts_bytes,
)
from januslens_server.pipelines.cost.interventions import PER_PROBABILITY
from januslens_server.pipelines.factor_readings import ENTRIES, ROWS_AT_ONCE
from januslens_server.pipelines.resolve import ResolvedGradientLens
from januslens_server.results import MatrixKind
from januslens_server.specs import GradientLensSpec

# Bytes of a component without its projection: norms, ranks, entries of the other side.
COMPONENT_BYTES = 48 + 8 * ENTRIES


@dataclass(frozen=True)
class MatrixSizes:
    """Count and sizes of the matrices whose gradients a request computes.

    `widths` is the sum of `d_in + d_out` over the matrices, `weights` the sum of `d_in * d_out`,
    and `lowest` the lowest layer that has such a matrix.
    """

    count: int
    widths: int
    weights: int
    lowest: int


def gradient_lens_demand(request: ResolvedGradientLens) -> Demand:
    """Return the demand of both passes, and of projecting the components of every matrix."""
    model, spec, objective = request.model, request.spec, request.objective
    sizes, tokens = cost_sizes(model), len(objective.tokens)
    scored = objective.loss.positions
    matrices = matrix_sizes(model, request.matrices, sizes, tokens)
    components = min(spec.components or tokens, tokens)
    singular = min(spec.spectrum_rank, tokens)
    neurons = 3 * min(spec.neurons, sizes.facts.d_mlp)
    segments = 0 if spec.subject is None else tokens
    vectors = 1 + matrices.count * (components + singular + neurons + segments)
    calls = 1 + bool(singular) + 3 * bool(neurons) + bool(segments)
    passes = (FORWARD + BACKWARD) * (1 + (matrices.count if spec.verify else 0))
    attention = _attention_sizes(sizes, len(request.attention_layers), tokens)
    return Demand(
        passes=passes,
        flops=passes * pass_flops(sizes, tokens, scored)
        + lens_flops(sizes, vectors)
        + _factor_flops(spec, matrices, tokens)
        + attention.flops,
        vectors=vectors,
        readings=1 + matrices.count * calls,
        ranks=vectors * (len(objective.targets) + 1),
        memory=_memory(sizes, spec, matrices, tokens, scored, vectors // max(1, matrices.count))
        + attention.kept
        + attention.working,
        stream=_stream(sizes, spec, matrices, tokens, components, singular + neurons)
        + attention.stream,
        held=_held(sizes, spec, matrices, tokens, vectors // max(1, matrices.count))
        + attention.kept,
        changed=2 * PER_PROBABILITY * attention.probabilities,
    )


class _AttentionSizes(NamedTuple):
    """Operations of attention gradients, and their bytes: kept, needed at a time, and sent."""

    flops: float
    probabilities: int
    kept: int
    working: int
    stream: int


def _attention_sizes(sizes: CostSizes, layers: int, tokens: int) -> _AttentionSizes:
    """Count the attention gradients of some layers; a model may have no layer with known heads."""
    if not layers:
        return _AttentionSizes(0.0, 0, 0, 0, 0)
    facts = sizes.facts
    width, row = facts.n_heads * facts.d_head, memory.FLOAT32 * facts.n_heads * tokens
    both = width + 2 * facts.n_kv_heads * facts.d_head
    rows = rows_at_once(facts.n_heads, tokens)
    step = 8 * row * min(tokens, rows) + 4 * memory.FLOAT32 * tokens * width
    sent = 3 * row * tokens
    return _AttentionSizes(
        flops=layers * 4.0 * tokens * tokens * width,
        probabilities=layers * facts.n_heads * tokens * tokens,
        kept=layers * tokens * (sizes.item * both + memory.FLOAT32 * width),
        working=step,
        stream=layers * (sent + 64 * (1 + sent // STEP_BYTES)),
    )


def matrix_sizes(
    model: ResidentModel,
    chosen: Sequence[tuple[int, MatrixKind | str]],
    sizes: CostSizes,
    tokens: int,
) -> MatrixSizes:
    """Count the matrices `chosen`; each expert that a token is routed to has its own matrices."""
    experts = min(model.view.facts.n_experts, tokens * sizes.facts.n_experts)
    count = widths = weights = 0
    for layer, kind in chosen:
        matrix = model.view.source(layer, kind)
        copies = experts if isinstance(matrix, ExpertMatrices) else 1
        d_in, d_out = _shape(sizes, matrix, kind)
        count += copies
        widths += copies * (d_in + d_out)
        weights += copies * d_in * d_out
    return MatrixSizes(count, widths, weights, min(layer for layer, _ in chosen))


def _shape(
    sizes: CostSizes, matrix: Linear | ExpertMatrices, kind: MatrixKind | str
) -> tuple[int, int]:
    facts = sizes.facts
    if isinstance(matrix, Linear) and isinstance(kind, str):
        return matrix.d_in, matrix.d_out
    if kind is MatrixKind.Q:
        return facts.d_model, facts.n_heads * facts.d_head
    if kind is MatrixKind.O:
        return facts.n_heads * facts.d_head, facts.d_model
    if kind in {MatrixKind.K, MatrixKind.V}:
        return facts.d_model, facts.n_kv_heads * facts.d_head
    widths = facts.d_model, facts.d_mlp
    return widths[::-1] if kind is MatrixKind.FF2 else widths


def _factor_flops(spec: GradientLensSpec, matrices: MatrixSizes, tokens: int) -> float:
    """Return the operations of norms, and if requested of spectrum, neurons and verification."""
    rows = min(tokens, matrices.widths // max(1, 2 * matrices.count))
    # Operations in float64 take twice as long.
    flops = 4.0 * tokens * min(tokens * matrices.widths, matrices.weights)
    if spec.spectrum_rank:
        flops += 8.0 * tokens * rows * matrices.widths + 60.0 * rows**3 * matrices.count
    if spec.neurons:
        flops += 4.0 * tokens * rows * matrices.widths
    if spec.verify:
        flops += 4.0 * tokens * matrices.weights
    return flops


def _factors(sizes: CostSizes, matrices: MatrixSizes, tokens: int) -> int:
    """Return the bytes of all factors; VJPs are kept in float32 as well."""
    return tokens * matrices.widths * (sizes.item + memory.FLOAT32)


def _memory(
    sizes: CostSizes,
    spec: GradientLensSpec,
    matrices: MatrixSizes,
    tokens: int,
    scored: int,
    vectors: int,
) -> int:
    """Return the bytes of all factors, and of either autograd's graph or one matrix's results."""
    facts = sizes.facts
    listed = spec.lens.top_k + spec.lens.bottom_k
    layers = facts.n_layers - matrices.lowest
    logits = 6 * memory.FLOAT32 * scored * facts.vocab_size
    passing = logits + memory.passing(sizes, tokens, scored)
    each = max(1, matrices.count)
    dense = 0
    if spec.verify:
        graph = facts.n_layers * memory.kept_for_backward(sizes, tokens)
        dense = 4 * memory.FLOAT32 * matrices.weights // each + graph + passing
    double = 8 * 6 * tokens * matrices.widths // each + 8 * 6 * tokens * tokens
    after = memory.read(sizes, vectors, listed) + max(double, dense)
    backward = layers * memory.kept_for_backward(sizes, tokens) + passing
    return _factors(sizes, matrices, tokens) + max(backward, after)


def _held(
    sizes: CostSizes, spec: GradientLensSpec, matrices: MatrixSizes, tokens: int, vectors: int
) -> int:
    """Return the bytes of all factors, and of the results that were computed together last."""
    components = min(spec.components or tokens, tokens)
    at_once = min(matrices.count, max(1, ROWS_AT_ONCE // components))
    listed = spec.lens.top_k + spec.lens.bottom_k
    copies = memory.FLOAT32 * tokens * matrices.widths if spec.include_factors else 0
    records = memory.reported(at_once * vectors, listed + ENTRIES)
    own = sizes.item * tokens * sizes.facts.d_model
    return _factors(sizes, matrices, tokens) + own + copies + records


def _stream(
    sizes: CostSizes,
    spec: GradientLensSpec,
    matrices: MatrixSizes,
    tokens: int,
    components: int,
    others: int,
) -> int:
    listed = spec.lens.top_k + spec.lens.bottom_k
    rows = matrices.count * (components + others)
    head = tokens * TOKEN_BYTES + matrices.count * 640
    factors = memory.FLOAT32 * components * matrices.widths if spec.include_factors else 0
    each = COMPONENT_BYTES + reading_bytes(listed)
    return head + rows * each + factors + texts_bytes(sizes, rows * listed)

"""What a model must hold before it is served, measured on its own weights when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from januslens_server.errors import ModelFailed, NotFinite, never_cancelled
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.float32_blocks import blocks_in_float32
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import Guarantee, ModelFacts, NodeKind, TraceSummary
from januslens_server.specs import LensSpec, TraceSpec

PROMPT_LENGTH = 8


def self_check(model: ResidentModel) -> Sequence[Guarantee]:
    """Trace a short prompt at every position with all checks; all must hold to be served.

    The checks see every node. Only the predictions are projected, because projecting all nodes
    over a wide vocabulary takes most of the time until the model is ready.

    Raises `ModelFailed` if the model overflows on it.
    """
    spec = TraceSpec(
        prompt=_prompt(model.view.facts),
        all_positions=True,
        lens=LensSpec(top_k=0, bottom_k=0),
        node_kinds=frozenset({NodeKind.PREDICTION}),
        include_logit_contribution=True,
        include_checks=True,
    )
    try:
        *_, summary = trace(resolve_trace(model, spec), never_cancelled)
        in_float32 = blocks_in_float32(model, _prompt(model.view.facts))
    except NotFinite as error:
        raise ModelFailed(f"self-check: {error}") from error
    checks = summary.checks if isinstance(summary, TraceSummary) else ()
    return [*checks, in_float32]


def _prompt(facts: ModelFacts) -> tuple[int, ...]:
    """Token ids spread over the vocabulary: no text is typical of every model."""
    length = min(PROMPT_LENGTH, facts.max_positions)
    return tuple(facts.vocab_size * (2 * i + 1) // (2 * length) for i in range(length))

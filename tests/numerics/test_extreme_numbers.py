"""Numbers whose squares overflow float32 are refused or computed correctly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from januslens_server.errors import InvalidRequest, NotFinite
from januslens_server.lens.backward_lens import lengths, sizes
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.project import project_vectors
from januslens_server.pipelines.resolve import resolve_gradient_lens, resolve_project, resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import TraceSummary
from januslens_server.specs import (
    GradientLensSpec,
    LensKind,
    LensSpec,
    LogitDifference,
    NegativeLogLikelihood,
    ProjectSpec,
    TraceSpec,
)
from tests.architectures.cases import CASES
from tests.architectures.tiny_models import plain, resident

LLAMA = next(case for case in CASES if case.id.startswith("llama-"))


def never() -> None:
    """A cancellation check that never cancels."""


def scaled(name: str, factor: float) -> ResidentModel:
    """Return a Llama whose embeddings, and so its residual stream, are multiplied."""
    case = replace(LLAMA, name=f"{LLAMA.name} {name}")
    with torch.no_grad():
        plain(case).get_input_embeddings().weight.mul_(factor)
    return resident(case)


@pytest.mark.parametrize("factor", [1e20, 1e30])
def test_a_trace_of_activations_that_overflow_when_squared_is_refused(factor: float) -> None:
    model = scaled("huge", factor)
    with pytest.raises(NotFinite, match="too large"):
        list(trace(resolve_trace(model, TraceSpec(tuple(LLAMA.prompt))), lambda: None))


def test_large_activations_that_can_be_squared_are_traced() -> None:
    model = scaled("large", 1e15)
    for event in trace(resolve_trace(model, TraceSpec(tuple(LLAMA.prompt))), lambda: None):
        norms = getattr(event, "norms", np.zeros(1))
        assert np.isfinite(norms).all()


@pytest.mark.parametrize("value", [1e19, 1e20, 3e38])
def test_vectors_that_overflow_when_squared_are_refused(value: float) -> None:
    model = resident(LLAMA)
    vectors = np.full((1, model.view.facts.d_model), value, dtype=np.float32)
    with pytest.raises(InvalidRequest, match="too large: squaring overflows float32"):
        list(project_vectors(resolve_project(model, ProjectSpec(vectors)), lambda: None))


def test_norms_of_vectors_that_vanish_when_squared_are_right() -> None:
    tiny = torch.tensor([[3e-30, 4e-30], [0.0, 0.0]])
    assert lengths(tiny).tolist() == pytest.approx([5e-30, 0.0], rel=1e-6)
    assert sizes(tiny, tiny).tolist() == pytest.approx([25e-60, 0.0], rel=1e-6)


def test_a_learning_rate_that_overflows_is_refused() -> None:
    spec = GradientLensSpec(
        tuple(LLAMA.prompt), NegativeLogLikelihood((5,)), neurons=3, learning_rate=3e38
    )
    with pytest.raises(InvalidRequest, match="learning rate too large"):
        list(gradient_lens(resolve_gradient_lens(resident(LLAMA), spec), lambda: None))


def with_head(name: str, factor: float, data_type: torch.dtype = torch.float32) -> ResidentModel:
    """Return a Llama whose unembedding, and so its logits, are multiplied."""
    case = replace(LLAMA, name=f"{LLAMA.name} {name}")
    with torch.no_grad():
        plain(case).get_output_embeddings().weight.mul_(factor)
    return resident(case, data_type)


def test_checks_hold_where_all_logits_are_zero() -> None:
    spec = TraceSpec(tuple(LLAMA.prompt), include_checks=True, include_logit_contribution=True)
    *_, summary = trace(resolve_trace(with_head("without logits", 0.0), spec), lambda: None)
    assert isinstance(summary, TraceSummary)
    assert summary.checks
    assert all(check.held and np.isfinite(check.measured_error) for check in summary.checks)


@pytest.mark.parametrize("factor", [1e33, 1e37])
def test_logits_that_overflow_are_refused(factor: float) -> None:
    model = with_head(f"overflowing {factor}", factor)
    vectors = np.full((2, model.view.facts.d_model), 1e15, dtype=np.float32)
    with pytest.raises(InvalidRequest, match="overflow float32; scale the vectors down"):
        list(
            project_vectors(
                resolve_project(model, ProjectSpec(vectors, LensSpec(kind=LensKind.RAW))), never
            )
        )
    large = TraceSpec(tuple(LLAMA.prompt), lens=LensSpec(kind=LensKind.RAW))
    scaled_up = scaled(f"large too {factor}", 1e15)
    scaled_up = replace(scaled_up, view=replace(scaled_up.view, lens=model.view.lens))
    with pytest.raises(NotFinite, match="overflow float32"):
        list(trace(resolve_trace(scaled_up, large), never))


def test_a_half_precision_models_overflow_is_refused_with_advice() -> None:
    model = with_head("overflowing in half precision", 3e4, torch.float16)
    with pytest.raises(NotFinite, match="--data-type float32 instead of float16"):
        list(trace(resolve_trace(model, TraceSpec(tuple(LLAMA.prompt))), never))
    spec = GradientLensSpec(tuple(LLAMA.prompt), NegativeLogLikelihood((5,)))
    with pytest.raises(NotFinite, match="--data-type float32 instead of float16"):
        list(gradient_lens(resolve_gradient_lens(model, spec), never))


def test_a_loss_that_overflows_is_refused() -> None:
    model = with_head("with far apart logits", 1e38)
    logits = model.network(torch.tensor([LLAMA.prompt])).logits[0, -1]
    spec = GradientLensSpec(
        tuple(LLAMA.prompt), LogitDifference((int(logits.argmax()),), (int(logits.argmin()),))
    )
    with pytest.raises(NotFinite):
        list(gradient_lens(resolve_gradient_lens(model, spec), never))

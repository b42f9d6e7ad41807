"""Results that the Backward Lens paper reports of large models hold for `demo`.

Targets are counterfactual: the answer of another fact of the relation, half the table away.
"""

from __future__ import annotations

import numpy as np
import pytest

from demo_training.measurements import Edit, sample_edits
from januslens_server.models.loader import load
from januslens_server.models.registry import embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.resolve import resolve_gradient_lens, resolve_preview_edit
from januslens_server.results import End, GradientMatrix, GradientSummary, MatrixKind
from januslens_server.specs import (
    ForwardShift,
    GradientLensSpec,
    LensKind,
    LensSpec,
    NegativeLogLikelihood,
    PreviewEditSpec,
    Probe,
)
from tests.support.results import only

LAST_LAYER = 3
ETA = 0.15


@pytest.fixture(scope="module")
def demo() -> ResidentModel:
    return load(embedded_source("cpu", "float32"))


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return sample_edits(stride=40)


def test_target_is_at_the_promoted_end(demo: ResidentModel, edits: list[Edit]) -> None:
    """The normalised rank of the target in FF2's VJP at the last position; 1 is the bottom."""
    ranks: dict[int, list[float]] = {}
    for edit in edits:
        spec = GradientLensSpec(
            edit.prompt.text,
            NegativeLogLikelihood(f" {edit.target}"),
            matrices=(MatrixKind.FF2,),
            lens=LensSpec(kind=LensKind.NORMALIZED),
        )
        events = list(gradient_lens(resolve_gradient_lens(demo, spec), lambda: None))
        for matrix in (event for event in events if isinstance(event, GradientMatrix)):
            assert matrix.promoted_end is End.BOTTOM
            parts = matrix.components
            last = parts.positions.argmax()
            rank = parts.target_ranks[last, 0] / (demo.view.facts.vocab_size - 1)
            ranks.setdefault(matrix.layer, []).append(rank)
    assert len(ranks) == 4
    assert np.mean(ranks[LAST_LAYER]) > 0.999
    assert all(np.mean(found) > 0.98 for found in ranks.values()), ranks


def test_the_last_and_the_last_subject_position_dominate(
    demo: ResidentModel, edits: list[Edit]
) -> None:
    """In every layer, one of these two segments has the largest mean VJP norm."""
    dominated = []
    for edit in edits:
        spec = GradientLensSpec(
            edit.prompt.text,
            NegativeLogLikelihood(f" {edit.target}"),
            matrices=(MatrixKind.FF2,),
            subject=edit.prompt.fact.subject,
        )
        *_, summary = gradient_lens(resolve_gradient_lens(demo, spec), lambda: None)
        assert isinstance(summary, GradientSummary)
        for layer in range(4):
            rows = [row for row in summary.segments if row.layer == layer]
            largest = max(rows, key=lambda row: row.mean_vjp_norm)
            dominated.append(largest.segment in {"last_token", "last_subject_token"})
    assert np.mean(dominated) >= 0.9


def test_the_forward_shift_edits_one_fact_and_spares_others(
    demo: ResidentModel, edits: list[Edit]
) -> None:
    """The edit of section 7 in the last layer mostly succeeds and mostly spares other relations."""
    worked, spared = [], []
    for edit, other in zip(edits, edits[1:] + edits[:1], strict=True):
        if edit.prompt.fact.relation == other.prompt.fact.relation:
            continue
        spec = PreviewEditSpec(
            edit.prompt.text,
            f" {edit.target}",
            ForwardShift(LAST_LAYER, ETA),
            (Probe("another relation", other.prompt.text, None),),
        )
        preview = only(preview_edit(resolve_preview_edit(demo, spec), lambda: None))
        worked.append(preview.edited.rank_after == 0)
        (probe,) = preview.probes
        spared.append(probe.predicted_before == probe.predicted_after)
    assert len(worked) >= 5
    assert np.mean(worked) >= 0.9
    assert np.mean(spared) >= 0.85

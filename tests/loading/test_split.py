"""A model that is split over devices gives the same numbers as the whole model."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from januslens_server.errors import InvalidRequest
from januslens_server.models.loader import load
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.project import project_vectors
from januslens_server.pipelines.resolve import (
    resolve_gradient_lens,
    resolve_preview_edit,
    resolve_project,
    resolve_trace,
)
from januslens_server.pipelines.self_check import self_check
from januslens_server.pipelines.trace import trace
from januslens_server.results import NAMED_KINDS, GradientMatrix
from januslens_server.specs import (
    DescentStep,
    ForwardShift,
    GradientLensSpec,
    LensSpec,
    NegativeLogLikelihood,
    PreviewEditSpec,
    ProjectSpec,
    TraceSpec,
)
from tests.architectures.cases import MEASURED, Case
from tests.loading.folders import room_for, saved

DIFFERS = {"provenance", "times", "checks", "verification"}


class Pair:
    """A case's model on the CPU, and split between CPU and disk."""

    def __init__(self, case: Case, part: float, folder: Path) -> None:
        self.case = case
        self.ids = tuple(case.prompt)
        source = saved(case, folder / "model")
        limits = room_for(case, part)
        self.whole = load(source)
        self.split = load(
            replace(source, device="auto", limits=limits, offload_dir=folder / "offloaded")
        )

    def assert_same(self, resolve: Any, run: Any, spec: Any) -> None:
        models = self.whole, self.split
        events, others = (list(run(resolve(m, spec), lambda: None)) for m in models)
        assert len(events) == len(others)
        for event, other in zip(events, others, strict=True):
            assert_same_figures(event, other)


def assert_same_figures(one: Any, other: Any) -> None:
    """Compare field by field; sums over experts may be rounded differently on another device."""
    if is_dataclass(one):
        for field in fields(one):
            if field.name not in DIFFERS:
                assert_same_figures(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for own, others in zip(one, other, strict=True):
            assert_same_figures(own, others)
    elif isinstance(one, float) or (isinstance(one, np.ndarray) and one.dtype.kind == "f"):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_equal(one, other)


# The ways to store and read weights: Conv1D, fused and separate maps, ALiBi, rotations, post-norms
# with caps, norms with a row for each head, experts, narrow embeddings, a family without adapter.
CHOSEN = {
    "gpt2-plain": 0.5,
    "bloom-power of two": 0.5,
    "gemma2-multi-head, biased": 0.5,
    "cohere-grouped, norms": 0.0,
    "opt-projected": 0.5,
    "mixtral-window": 0.5,
    "glm4-automatic": 0.5,
}
BY_ID = {case.id: case for case in MEASURED}


@pytest.fixture(scope="module", params=CHOSEN)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    return Pair(BY_ID[name], CHOSEN[name], tmp_path_factory.mktemp("pair"))


def test_weights_are_placed_on_both_devices_or_on_disk_only(pair: Pair) -> None:
    placed = pair.split.provenance.device
    assert placed == ("disk" if CHOSEN[pair.case.id] == 0.0 else "cpu, disk")
    assert any(p.device.type == "meta" for p in pair.split.network.parameters())
    assert pair.whole.provenance.device == "cpu"
    assert not any(p.device.type == "meta" for p in pair.whole.network.parameters())


def test_the_self_check_holds(pair: Pair) -> None:
    assert [guarantee.held for guarantee in self_check(pair.split)] == [True] * 4


def test_trace_is_the_same(pair: Pair) -> None:
    spec = TraceSpec(
        prompt=pair.ids,
        positions=(2, -1),
        include_logit_contribution=True,
        include_checks=True,
        include_vectors=True,
    )
    pair.assert_same(resolve_trace, trace, spec)


def test_gradients_are_the_same_and_verified(pair: Pair) -> None:
    spec = GradientLensSpec(
        prompt=pair.ids,
        loss=NegativeLogLikelihood((5, 7)),
        matrices=NAMED_KINDS,
        neurons=3,
        include_factors=True,
        verify=True,
    )
    pair.assert_same(resolve_gradient_lens, gradient_lens, spec)
    events = gradient_lens(resolve_gradient_lens(pair.split, spec), lambda: None)
    checks = [event.verification for event in events if isinstance(event, GradientMatrix)]
    assert checks
    assert all(check is not None and check.held for check in checks)


def test_projections_are_the_same(pair: Pair) -> None:
    width = pair.whole.view.facts.d_model
    vectors = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
    pair.assert_same(
        resolve_project, project_vectors, ProjectSpec(vectors, LensSpec(), target=(3,))
    )


@pytest.mark.parametrize("edit", [ForwardShift(1, 0.5), DescentStep((), (), 0.1)])
def test_edits_are_the_same(pair: Pair, edit: ForwardShift | DescentStep) -> None:
    spec = PreviewEditSpec(pair.ids, (5,), edit)
    refused = {"opt-projected": "width 16; expected its d_model 32"}
    if pair.whole.view.facts.n_experts:
        refused[pair.case.id] = "layer 1 has experts"
    if isinstance(edit, ForwardShift) and pair.case.id in refused:
        with pytest.raises(InvalidRequest, match=refused[pair.case.id]):
            list(preview_edit(resolve_preview_edit(pair.split, spec), lambda: None))
    else:
        pair.assert_same(resolve_preview_edit, preview_edit, spec)


def test_weights_on_disk_are_not_kept_in_memory(pair: Pair) -> None:
    before = placed_on_meta(pair.split)
    pair.assert_same(resolve_trace, trace, TraceSpec(prompt=pair.ids))
    pair.assert_same(
        resolve_gradient_lens,
        gradient_lens,
        GradientLensSpec(pair.ids, NegativeLogLikelihood((5,))),
    )
    assert placed_on_meta(pair.split) == before != set()


def placed_on_meta(model: ResidentModel) -> set[str]:
    return {name for name, p in model.network.named_parameters() if p.device.type == "meta"}

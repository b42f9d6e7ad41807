"""Compare with graphs, gradients, steps and shifts recorded from the papers' programs.

See goldens/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.resolve import resolve_preview_edit
from januslens_server.results import Effect, MatrixKind
from januslens_server.specs import DescentStep, ForwardShift, LensKind, PreviewEditSpec
from tests.reference.backward_lens import BackwardErrors, compare
from tests.reference.backward_lens import spec_of as gradient_spec_of
from tests.reference.examples import Loaded
from tests.reference.goldens import FAMILIES, GOLDENS, load_golden_model, names, read_golden
from tests.reference.gradients import run_gradient
from tests.reference.graph import PromptOracle, expected_graph
from tests.reference.traces import GraphErrors, run_trace
from tests.reference.visit import VisitErrors, compare_edges, compare_nodes, spec_of
from tests.support.results import only

VISIT, BACKWARD, SHIFT = (names(GOLDENS, kind) for kind in ("visit", "backward", "shift"))
ATTENTION = (MatrixKind.Q, MatrixKind.K, MatrixKind.V, MatrixKind.O)
MLP = (MatrixKind.FF1, MatrixKind.FF2)

LoadModel = Callable[[str], Loaded]


@pytest.fixture(scope="module")
def load_model(tmp_path_factory: pytest.TempPathFactory) -> LoadModel:
    folder = tmp_path_factory.mktemp("goldens")
    return cache(lambda family: load_golden_model(GOLDENS, family, folder))


def test_every_family_and_variant_is_recorded() -> None:
    recorded = [read_golden(GOLDENS, name).data for name in VISIT]
    variants = {(data["arch"], data["variant"]) for data in recorded}
    assert variants == {
        *((family, variant) for family in FAMILIES for variant in ("default", "small")),
        ("gptj", "as_shipped"),
    }
    assert {len(data["input_ids"]) == 1 for data in recorded} == {True, False}
    assert {len(data["layers"]) for data in recorded} == {1, 2}
    assert {read_golden(GOLDENS, name).data["arch"] for name in BACKWARD} == set(FAMILIES)


@pytest.mark.parametrize("name", VISIT)
def test_recorded_graph(name: str, load_model: LoadModel) -> None:
    golden = read_golden(GOLDENS, name)
    loaded, spec, errors = load_model(golden.data["arch"]), spec_of(golden), VisitErrors()
    traced = run_trace(loaded.resident, spec)
    compare_nodes(golden, traced, errors)
    compare_edges(golden, traced, errors)
    assert errors.vector <= 2e-5
    # The recording has six digits.
    assert errors.norm <= 1e-5
    assert errors.probability <= 1e-4
    assert errors.entropy_bits <= 2e-5
    assert errors.activation <= 2e-5
    assert errors.weight <= 1e-5

    # Vectors that are wrong or missing in the recording are compared with the reference.
    oracle = PromptOracle(loaded.reference, golden.data["input_ids"])
    missing = GraphErrors()
    missing.add(traced, expected_graph(oracle, spec.layers, spec.positions, spec.selection))
    # In unscaled attention, the parts left out may be as small as 1e-6 of the sum.
    assert missing.vector <= 2e-4
    assert missing.share <= 2e-5
    assert missing.attention <= 2e-5


@pytest.mark.parametrize("lens", [LensKind.FINAL_NORM, LensKind.NORMALIZED])
@pytest.mark.parametrize("name", BACKWARD)
def test_recorded_gradient(name: str, lens: LensKind, load_model: LoadModel) -> None:
    golden, errors = read_golden(GOLDENS, name), BackwardErrors()
    loaded = load_model(golden.data["arch"])
    found = run_gradient(loaded.resident, gradient_spec_of(golden, lens))
    compare(golden, found, lens, loaded.reference, errors)
    assert errors.ties == 0
    assert errors.matrices == 4 * 6
    assert errors.factor <= 1e-5
    assert errors.norm <= 1e-5
    assert errors.probability <= 1e-4


@pytest.mark.parametrize("recorded", ["after_sgd_mlp_only", "after_sgd_mlp_and_attn"])
@pytest.mark.parametrize("name", BACKWARD)
def test_recorded_descent_step(name: str, recorded: str, load_model: LoadModel) -> None:
    data = read_golden(GOLDENS, name).data
    matrices = MLP if recorded == "after_sgd_mlp_only" else (*ATTENTION, *MLP)
    step = DescentStep(matrices, (), data["lr"])
    spec = PreviewEditSpec(tuple(data["input_ids"]), (data["target_id"],), step)
    effect = effect_of(load_model(data["arch"]), spec)
    assert effect.probability_before == pytest.approx(data["p_target_before"], rel=1e-4)
    assert effect.probability_after == pytest.approx(data[recorded]["p_target"], rel=1e-4)
    assert effect.rank_after == data[recorded]["rank_target"]


@pytest.mark.parametrize("name", SHIFT)
def test_recorded_forward_shift(name: str, load_model: LoadModel) -> None:
    data = read_golden(GOLDENS, name).data
    (layer,) = data["layers"]
    shift = ForwardShift(layer, data["lr"])
    spec = PreviewEditSpec(tuple(data["input_ids"]), (data["target_id"],), shift)
    effect = effect_of(load_model(data["arch"]), spec)
    for probability, rank, predicted, wanted in (
        (effect.probability_before, effect.rank_before, effect.predicted_before, data["before"]),
        (effect.probability_after, effect.rank_after, effect.predicted_after, data["after"]),
    ):
        assert probability == pytest.approx(wanted["p_target"], rel=1e-4)
        assert rank + 1 == wanted["rank_target"]
        assert predicted == wanted["top"][0]


def effect_of(loaded: Loaded, spec: PreviewEditSpec) -> Effect:
    return only(preview_edit(resolve_preview_edit(loaded.resident, spec), lambda: None)).edited

"""Every request gives on a second device what it gives on the CPU, and waits for it seldom.

The device is a stand-in (`tests/support/second_device.py`), so this finds tensors on the wrong
device, waits inside layers, and copies that are read before they arrive, on a machine without a
GPU. It says nothing about a GPU's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from januslens_server import transfer
from januslens_server.errors import never_cancelled
from januslens_server.graph import weighted_rows
from januslens_server.lens.unembedding import Product
from januslens_server.models import lora
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.find_neurons import find_neurons
from januslens_server.pipelines.generate import generate
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.intervene import intervene
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.project import project_vectors
from januslens_server.pipelines.resolve import (
    resolve_activations,
    resolve_find_neurons,
    resolve_generate,
    resolve_gradient_lens,
    resolve_intervene,
    resolve_preview_edit,
    resolve_project,
    resolve_trace,
)
from januslens_server.pipelines.self_check import self_check
from januslens_server.pipelines.trace import trace
from januslens_server.results import NAMED_KINDS, GradientMatrix, LayerGraph
from januslens_server.specs import (
    ActivationsSpec,
    Criterion,
    DescentStep,
    ExperimentSpec,
    FindNeuronsSpec,
    GenerateSpec,
    GradientLensSpec,
    InterveneSpec,
    InterventionSpec,
    LayerReading,
    LensSpec,
    NegativeLogLikelihood,
    PatchFrom,
    PreviewEditSpec,
    ProjectSpec,
    Scale,
    Selection,
    Site,
    TraceSpec,
    Zero,
)
from tests.architectures.cases import MEASURED, Case
from tests.architectures.test_interventions import OTHER_PROMPT
from tests.architectures.test_levels import ALTUP, HYPER, QWEN3_NEXT
from tests.architectures.test_mixer_heads import KIMI
from tests.architectures.tiny_models import resident
from tests.loading.test_lora import pairs_of, write
from tests.loading.test_split import assert_same_figures
from tests.support.second_device import MixedDevices, Record, moved, second_device

BY_ID = {case.id: case for case in MEASURED}
LLAMA = BY_ID["llama-grouped"]
# Conv1D, fused maps, ALiBi, post-norms with caps, windows, norms of queries and keys, experts. Read
# by their structure: latent attention, complex rotations, chunks, per-layer inputs, delta rules,
# state spaces beside attention and in place of it. Several residual streams.
CHOSEN = (
    *(
        case
        for case in MEASURED
        if case.id
        in {
            "gpt2-plain",
            "bloom-power of two",
            "gemma2-grouped, capped, window",
            "qwen3-grouped, window",
            "mixtral-window",
        }
        or case.family
        in {
            "deepseek_v2",
            "deepseek_v3",
            "llama4_text",
            "gemma4_text",
            "falcon_h1",
            "nemotron_h",
            "glm_moe_dsa",
        }
    ),
    QWEN3_NEXT,
    KIMI,
    ALTUP,
    HYPER,
)
# Those whose gradients are compared: of fused maps, experts, complex rotations and a delta rule.
DIFFERENTIATED = (
    *(BY_ID[name] for name in ("gpt2-plain", "llama-grouped", "mixtral-window")),
    *(case for case in MEASURED if case.family == "deepseek_v2"),
    QWEN3_NEXT,
)
# Waits per layer of a trace at one position: for the selected heads and sources of attention, for
# the rows of W_O and of FF2, for the graph's numbers, and for the projections. A layer of experts
# also waits for the numbers of the routed ones.
WAITS_PER_LAYER, OF_EXPERTS = 6, 1
# Waits outside of layers: the model's own mask, the check of the pass, the targets, the final norm.
WAITS_ONCE = 10
# Waits of a gradient for each matrix, or each expert's matrix: its factors cross in one copy. The
# numbers of the routed experts are needed before, once for each kind of matrix.
WAITS_PER_MATRIX = 1
# Waits of a generated token: the check of its pass, the draw, its probability; its readings.
WAITS_PER_TOKEN, OF_READINGS = 3, 1
# Waits of the experiments that begin in one layer, which run together.
WAITS_PER_BATCH = 7


@pytest.fixture(scope="module")
def record() -> Iterator[Record]:
    with second_device() as found:
        yield found


@pytest.fixture(autouse=True)
def forgotten(record: Record) -> None:
    record.clear()


def on_device(case: Case, data_type: torch.dtype = torch.float32) -> ResidentModel:
    return resident(case, data_type, moved)


def results(events: Iterable[Any]) -> list[Any]:
    return [event for event in events if event is not None]


def both(case: Case, resolve: Any, run: Any, spec: Any, record: Record) -> list[Any]:
    """Run a request on both devices and compare; return the events of the second device."""
    return compared(on_device(case), resident(case), resolve, run, spec, record)


def compared(
    here: ResidentModel, there: ResidentModel, resolve: Any, run: Any, spec: Any, record: Record
) -> list[Any]:
    """Run a request on a model of the second device and on one of the CPU, and compare.

    Steps without a result are left out: an index of neurons that exists already needs none.
    """
    expected = results(run(resolve(there, spec), never_cancelled))
    request = resolve(here, spec)
    record.clear()
    found = results(run(request, never_cancelled))
    assert len(found) == len(expected)
    for event, other in zip(found, expected, strict=True):
        assert_same_figures(event, other)
    assert not record.pageable
    return found


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
def test_trace_is_the_same_and_waits_a_stated_number_of_times_per_layer(
    case: Case, record: Record
) -> None:
    spec = TraceSpec(tuple(case.prompt), include_logit_contribution=True, include_vectors=True)
    events = both(case, resolve_trace, trace, spec, record)
    layers = sum(isinstance(event, LayerGraph) for event in events) - 1
    each = WAITS_PER_LAYER + (OF_EXPERTS if on_device(case).view.facts.n_experts else 0)
    assert record.total <= layers * each + WAITS_ONCE, record.waits


@pytest.mark.parametrize("case", DIFFERENTIATED[1:], ids=lambda case: case.id)
def test_trace_of_all_positions_with_checks_and_attributions_is_the_same(
    case: Case, record: Record
) -> None:
    spec = TraceSpec(
        tuple(case.prompt),
        all_positions=True,
        selection=Selection(heads=2, by=Criterion.ATTRIBUTION),
        include_attribution=True,
        include_gradients=True,
        include_checks=True,
        overlap_k=3,
        other=(7,),
    )
    both(case, resolve_trace, trace, spec, record)


@pytest.mark.parametrize("name", ["gpt2-plain", "llama-grouped", "mixtral-window"])
def test_gradients_wait_a_stated_number_of_times_per_matrix(name: str, record: Record) -> None:
    case = BY_ID[name]
    spec = GradientLensSpec(tuple(case.prompt), NegativeLogLikelihood((5, 7)))
    events = both(case, resolve_gradient_lens, gradient_lens, spec, record)
    matrices = [event for event in events if isinstance(event, GradientMatrix)]
    kinds = {(matrix.layer, matrix.kind) for matrix in matrices if matrix.expert is not None}
    most = len(matrices) * WAITS_PER_MATRIX + len(kinds) + WAITS_ONCE
    assert record.total <= most, record.waits


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=lambda case: case.id)
def test_gradients_are_the_same_and_verified(case: Case, record: Record) -> None:
    spec = GradientLensSpec(
        tuple(case.prompt),
        NegativeLogLikelihood((5, 7)),
        matrices=NAMED_KINDS,
        neurons=3,
        include_factors=True,
        components=3,
        verify=True,
        include_attention_gradients=True,
    )
    both(case, resolve_gradient_lens, gradient_lens, spec, record)


CHANGES = (
    InterventionSpec(Site.HEAD_RESULT, Zero(), layers=(0,), heads=(1,)),
    InterventionSpec(Site.MLP_OUTPUT, Scale(0.5), layers=(1,), positions=(-1,)),
    InterventionSpec(Site.BLOCK_OUTPUT, PatchFrom(OTHER_PROMPT), layers=(0,), positions=(1,)),
)


def test_interventions_and_experiments_are_the_same(record: Record) -> None:
    experiments = tuple(ExperimentSpec("", (change,)) for change in CHANGES)
    spec = InterveneSpec(tuple(LLAMA.prompt), (7,), experiments=experiments)
    both(LLAMA, resolve_intervene, intervene, spec, record)
    both(
        LLAMA,
        resolve_trace,
        trace,
        TraceSpec(tuple(LLAMA.prompt), interventions=CHANGES),
        record,
    )


def test_many_experiments_wait_as_often_as_one(record: Record) -> None:
    def waits(count: int) -> int:
        heads = [
            InterventionSpec(Site.HEAD_RESULT, Zero(), layers=(i % 2,), positions=(i % 3,))
            for i in range(count)
        ]
        experiments = tuple(ExperimentSpec("", (head,)) for head in heads)
        spec = InterveneSpec(tuple(LLAMA.prompt), (7,), experiments=experiments)
        both(LLAMA, resolve_intervene, intervene, spec, record)
        return record.total

    assert waits(6) <= waits(1) + WAITS_PER_BATCH, record.waits


@pytest.mark.parametrize("reading", [None, LayerReading()])
def test_generation_waits_a_stated_number_of_times_per_token(
    reading: LayerReading | None, record: Record
) -> None:
    def waits(count: int) -> int:
        spec = GenerateSpec(tuple(LLAMA.prompt), max_new_tokens=count, reading=reading)
        both(LLAMA, resolve_generate, generate, spec, record)
        return record.total

    each = WAITS_PER_TOKEN + (OF_READINGS if reading else 0)
    assert waits(6) - waits(2) <= 4 * each, record.waits


def test_edits_wait_seldom(record: Record) -> None:
    edit = PreviewEditSpec(tuple(LLAMA.prompt), (5,), DescentStep((), (), 0.1))
    both(LLAMA, resolve_preview_edit, preview_edit, edit, record)
    assert record.total <= 3 * WAITS_ONCE, record.waits
    assert sum(n for line, n in record.waits.items() if "preview_edit" in line) <= 2


def test_generation_is_the_same(record: Record) -> None:
    spec = GenerateSpec(
        tuple(LLAMA.prompt), max_new_tokens=4, reading=LayerReading(), interventions=CHANGES[:2]
    )
    both(LLAMA, resolve_generate, generate, spec, record)


def test_other_requests_are_the_same(record: Record) -> None:
    ids, width = tuple(LLAMA.prompt), resident(LLAMA).view.facts.d_model
    vectors = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
    edit = PreviewEditSpec(ids, (5,), DescentStep((), (), 0.1))
    both(LLAMA, resolve_preview_edit, preview_edit, edit, record)
    both(LLAMA, resolve_project, project_vectors, ProjectSpec(vectors, LensSpec(), (3,)), record)
    both(LLAMA, resolve_activations, activations, ActivationsSpec(ids, (Site.QUERY,)), record)
    found = FindNeuronsSpec((5,), suppressed=False, layers=(), start=0, count=5)
    both(LLAMA, resolve_find_neurons, find_neurons, found, record)


def test_a_lora_over_a_base_on_the_device_is_the_same(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "available", lambda *_: 2**30)  # torch asks a real GPU
    folder = write(tmp_path / "lora", pairs_of(LLAMA))
    here, there = (
        lora.load_lora("tuned", folder, base) for base in (on_device(LLAMA), resident(LLAMA))
    )
    ids, nll = tuple(LLAMA.prompt), NegativeLogLikelihood((5, 7))
    lists = LensSpec(0, 0)  # those of vectors near 0 depend on rounding
    compared(here, there, resolve_trace, trace, TraceSpec(ids), record)
    gradient = GradientLensSpec(ids, nll, lens=lists, verify=True)
    compared(here, there, resolve_gradient_lens, gradient_lens, gradient, record)


def test_bfloat16_is_projected_without_a_copy_of_the_unembedding() -> None:
    model = on_device(LLAMA, torch.bfloat16)
    (block,) = model.view.lens.unembedding.blocks
    assert block.product is Product.THREE_PARTS
    head = model.network.get_output_embeddings().get_parameter("weight")
    assert block.matrix.untyped_storage().data_ptr() == head.untyped_storage().data_ptr()
    assert all(guarantee.held for guarantee in self_check(model))


def traced(record: Record) -> list[Any]:
    return both(LLAMA, resolve_trace, trace, TraceSpec(tuple(LLAMA.prompt)), record)


def test_a_tensor_that_stays_on_the_cpu_is_found(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(size: int, picked: torch.Tensor) -> torch.Tensor:
        return torch.ones(*picked.shape[:-1], size, dtype=torch.bool).scatter_(-1, picked, False)

    monkeypatch.setattr(weighted_rows, "left_out", forgetful)
    with pytest.raises(MixedDevices, match="scatter_"):
        traced(record)


def test_a_wait_for_each_row_is_found(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = weighted_rows.extremes

    def slow(scores: torch.Tensor, top: int, bottom: int) -> weighted_rows.Picked:
        assert all(float(score) == float(score) for score in scores)
        return extremes(scores, top, bottom)

    monkeypatch.setattr(weighted_rows, "extremes", slow)
    traced(record)
    layers = resident(LLAMA).view.facts.n_layers
    assert record.total > layers * WAITS_PER_LAYER + WAITS_ONCE


def test_numbers_that_are_read_before_they_arrive_are_found(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer.HostCopy, "_wait", lambda _copy: None)
    with pytest.raises(Exception, match=r"Not equal|overflow|nan|out of"):
        traced(record)


def test_a_copy_into_memory_that_is_not_pinned_is_found(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty

    def pageable(*size: Any, **options: Any) -> torch.Tensor:
        options.pop("pin_memory", None)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", pageable)
    with pytest.raises(AssertionError, match="pageable"):
        traced(record)

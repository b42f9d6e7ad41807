"""With equal logits there is one prediction everywhere: the lowest id, as `argmax` returns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from januslens_server.lens.extremes import BLOCK, highest, lowest
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.find_neurons import find_neurons
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.resolve import (
    resolve_find_neurons,
    resolve_gradient_lens,
    resolve_preview_edit,
    resolve_trace,
)
from januslens_server.pipelines.trace import trace
from januslens_server.results import GradientHeader, LayerGraph, NodeKind, TraceHeader
from januslens_server.specs import (
    DescentStep,
    FindNeuronsSpec,
    GradientLensSpec,
    LensSpec,
    NegativeLogLikelihood,
    PreviewEditSpec,
    TraceSpec,
)
from tests.architectures.cases import CASES
from tests.architectures.tiny_models import plain, resident


@pytest.mark.parametrize("width", [5, 100, 40 * BLOCK + 7])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("levels", [1, 2, 3, 50])
def test_extremes_list_equal_values_by_lower_id(width: int, count: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(width * count * levels)
    rows = torch.randint(levels, (20, width), generator=generator).float()
    for extremes, sign in ((highest, -1.0), (lowest, 1.0)):
        values, ids = extremes(rows, count)
        for row, got_values, got in zip(rows, values, ids, strict=True):
            expected = sorted(range(width), key=lambda i: (sign * float(row[i]), i))[:count]
            assert got.tolist() == expected
            assert got_values.tolist() == row[expected].tolist()


@pytest.fixture(scope="module")
def tied() -> ResidentModel:
    """A GPT-2 whose most likely tokens share one unembedding row."""
    case = replace(next(case for case in CASES if case.id == "gpt2-plain"), name="tied rows")
    network = plain(case)
    with torch.no_grad():
        rows = network.lm_head.weight
        rows[30:] = rows[30:31] * 10  # more rows than the index of neurons lists
    return resident(case)


def prompt_won_by_tied_rows(tied: ResidentModel) -> tuple[tuple[int, ...], int]:
    for start in range(30):
        ids = tuple((7 * i + start) % 30 for i in range(6))
        with torch.no_grad():
            logits = tied.network(torch.tensor([ids])).logits[0, -1]
        if int(logits.argmax()) >= 30:
            return ids, int(logits.argmax())
    raise AssertionError("no prompt was won by the tied rows")


def test_every_answer_predicts_the_lowest_of_equal_logits(tied: ResidentModel) -> None:
    ids, expected = prompt_won_by_tied_rows(tied)
    events = list(trace(resolve_trace(tied, TraceSpec(ids, lens=LensSpec(top_k=3))), lambda: None))
    header = next(event for event in events if isinstance(event, TraceHeader))
    assert header.targets[0].predicted_token_id == expected
    assert header.targets[0].target_rank == 0
    top = next(event for event in reversed(events) if isinstance(event, LayerGraph))
    prediction = next(i for i, n in enumerate(top.nodes) if n.kind is NodeKind.PREDICTION)
    listed = top.projections.top_ids[top.rows[prediction]].tolist()
    assert listed == [expected, expected + 1, expected + 2]
    spec = GradientLensSpec(ids, NegativeLogLikelihood((5,)), layers=(0,))
    gradient = next(iter(gradient_lens(resolve_gradient_lens(tied, spec), lambda: None)))
    assert isinstance(gradient, GradientHeader)
    assert gradient.predicted_token_id == expected
    edit = PreviewEditSpec(ids, (5,), DescentStep((), (), 1e-9))
    (preview,) = filter(None, preview_edit(resolve_preview_edit(tied, edit), lambda: None))
    assert preview.edited.predicted_before == expected


def test_an_edits_ranks_are_those_before_a_soft_cap_that_saturates() -> None:
    case = next(case for case in CASES if case.id.startswith("gemma2-"))
    case = replace(case, name="saturated cap")
    with torch.no_grad():
        plain(case).get_output_embeddings().weight.mul_(1000)
    model, ids = resident(case), tuple(case.prompt)
    with torch.no_grad():
        hidden = model.network.get_decoder()(torch.tensor([ids])).last_hidden_state[0, -1]
        raw = (model.network.get_output_embeddings().weight @ hidden).numpy()
    order = np.lexsort((np.arange(len(raw)), -raw))
    (header, *_) = trace(resolve_trace(model, TraceSpec(ids)), lambda: None)
    assert isinstance(header, TraceHeader)
    assert header.targets[0].predicted_token_id == order[0]
    for rank in (0, 1, 5):
        edit = PreviewEditSpec(ids, (int(order[rank]),), DescentStep((), (), 1e-9))
        (preview,) = filter(None, preview_edit(resolve_preview_edit(model, edit), lambda: None))
        assert preview.edited.predicted_before == order[0]
        assert preview.edited.rank_before == rank


@pytest.mark.parametrize("suppressed", [False, True])
@pytest.mark.parametrize("token", [30, 60, 93, 5])
def test_neurons_are_found_with_exact_ranks_among_equal_logits(
    tied: ResidentModel, token: int, suppressed: bool
) -> None:
    spec = FindNeuronsSpec((token,), suppressed, layers=(0,), start=0, count=1000)
    (found,) = filter(None, find_neurons(resolve_find_neurons(tied, spec), lambda: None))
    network = tied.network.get_submodule
    with torch.no_grad():
        values = network("transformer.h.0.mlp.c_proj").get_parameter("weight")
        logits = network("lm_head")(network("transformer.ln_f")(values)).numpy()
    ids = np.arange(logits.shape[1])
    expected = {}
    for neuron, row in enumerate(logits):
        order = np.lexsort((ids, row if suppressed else -row))
        if token in order[: found.depth]:
            expected[neuron] = int((row > row[token]).sum())
    assert set(found.neurons.tolist()) == expected.keys()
    ranks = found.projections.target_ranks[:, 0].tolist()
    assert dict(zip(found.neurons.tolist(), ranks, strict=True)) == expected

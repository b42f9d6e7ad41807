"""Equal logits: one prediction everywhere, the lowest id, as `argmax` gives it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from januslens_server.lens.extremes import BLOCK, highest, lowest
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.trace import trace
from januslens_server.results import GradientHeader, LayerGraph, NodeKind, TraceHeader
from januslens_server.specs import (
    DescentStep,
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
        rows[100:180] = rows[100:101] * 10
    return resident(case)


def prompt_won_by_tied_rows(tied: ResidentModel) -> tuple[tuple[int, ...], int]:
    for start in range(60):
        ids = tuple((7 * i + start) % 90 for i in range(6))
        with torch.no_grad():
            logits = tied.network(torch.tensor([ids])).logits[0, -1]
        if 100 <= int(logits.argmax()) < 180:
            return ids, int(logits.argmax())
    raise AssertionError("no prompt was won by the tied rows")


def test_every_answer_predicts_the_lowest_of_equal_logits(tied: ResidentModel) -> None:
    ids, expected = prompt_won_by_tied_rows(tied)
    events = list(trace(tied, TraceSpec(ids, lens=LensSpec(top_k=3)), lambda: None))
    header = next(event for event in events if isinstance(event, TraceHeader))
    assert header.targets[0].predicted_token_id == expected
    assert header.targets[0].target_rank == 0
    top = next(event for event in reversed(events) if isinstance(event, LayerGraph))
    prediction = next(i for i, n in enumerate(top.nodes) if n.kind is NodeKind.PREDICTION)
    listed = top.projections.top_ids[top.rows[prediction]].tolist()
    assert listed == [expected, expected + 1, expected + 2]
    spec = GradientLensSpec(ids, NegativeLogLikelihood((5,)), layers=(0,))
    gradient = next(iter(gradient_lens(tied, spec, lambda: None)))
    assert isinstance(gradient, GradientHeader)
    assert gradient.predicted_token_id == expected
    edit = PreviewEditSpec(ids, (5,), DescentStep((), (), 1e-9))
    (preview,) = filter(None, preview_edit(tied, edit, lambda: None))
    assert preview.edited.predicted_before == expected

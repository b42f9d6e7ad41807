"""Requests of every kind leave the resident model unchanged: weights, flags and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from januslens_server.errors import CancelCheck
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.resolve import (
    resolve_gradient_lens,
    resolve_preview_edit,
    resolve_trace,
)
from januslens_server.pipelines.trace import trace
from januslens_server.results import NAMED_KINDS
from januslens_server.specs import (
    DescentStep,
    ForwardShift,
    GradientLensSpec,
    KlDivergence,
    LensSpec,
    LogitDifference,
    NegativeLogLikelihood,
    PreviewEditSpec,
    TraceSpec,
)
from tests.reference.examples import EXAMPLES, LoadExample, prompt

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def bits(resident: ResidentModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in resident.network.state_dict().items()}


def hooks(resident: ResidentModel) -> int:
    modules = resident.network.modules()
    return sum(len(getattr(module, name)) for module in modules for name in HOOKS)


def assert_untouched(resident: ResidentModel, before: dict[str, torch.Tensor]) -> None:
    after = resident.network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for parameter in resident.network.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert not resident.network.training
    assert hooks(resident) == 0


def requests(
    resident: ResidentModel, ids: tuple[int, ...], check_cancelled: CancelCheck
) -> Iterator[Iterator[object]]:
    kinds = NAMED_KINDS
    yield trace(resolve_trace(resident, TraceSpec(ids, all_positions=True)), check_cancelled)
    verified = GradientLensSpec(ids, NegativeLogLikelihood((7,)), verify=True)
    yield gradient_lens(resolve_gradient_lens(resident, verified), check_cancelled)
    for loss in (
        NegativeLogLikelihood((7,)),
        NegativeLogLikelihood((7, 8)),
        LogitDifference((7,), (8,)),
        KlDivergence((7,)),
    ):
        yield gradient_lens(
            resolve_gradient_lens(resident, GradientLensSpec(ids, loss, kinds)), check_cancelled
        )


@pytest.mark.parametrize("name", EXAMPLES)
def test_mixed_requests_change_nothing(name: str, load_example: LoadExample) -> None:
    resident = load_example(name).resident
    before = bits(resident)
    for length in (1, 4):
        for request in requests(resident, tuple(prompt(name, length)), lambda: None):
            assert len(list(request)) >= 3
            assert_untouched(resident, before)


def test_two_hundred_mixed_requests_change_nothing(load_example: LoadExample) -> None:
    """Traces, gradients of every loss and previews of edits alternate on one resident model."""
    resident = load_example("llama_grouped").resident
    before = bits(resident)
    edits = (DescentStep((), (), 0.1), ForwardShift(1, 0.3))
    for i in range(200):
        ids = (1 + i % 900, 5)
        kind = i % 4
        if kind == 0:
            spec = TraceSpec(ids, layers=(i % 3,), lens=LensSpec(0, 0))
            answer: Iterator[object] = trace(resolve_trace(resident, spec), lambda: None)
        elif kind == 1:
            losses = (
                NegativeLogLikelihood((7, 8)),
                LogitDifference((7,), (8,)),
                KlDivergence((7,)),
            )
            gradient = GradientLensSpec(ids, losses[i % 3], lens=LensSpec(0, 0), verify=i % 40 == 1)
            answer = gradient_lens(resolve_gradient_lens(resident, gradient), lambda: None)
        else:
            preview = PreviewEditSpec(ids, (9,), edits[kind - 2])
            answer = preview_edit(resolve_preview_edit(resident, preview), lambda: None)
        assert len(list(answer)) >= 1
    assert_untouched(resident, before)


class StopError(Exception):
    """Raised by the check_cancelled of a cancelled request."""


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_requests_stopped_anywhere_change_nothing(
    name: str, which: int, load_example: LoadExample
) -> None:
    """They are stopped in the forward pass, in the backward pass and between results."""
    resident, ids = load_example(name).resident, tuple(prompt(name, 4))
    before = bits(resident)
    for last in (0, 1, 2, 3, 5):
        assert not finished(resident, ids, which, last)
        assert_untouched(resident, before)
    assert finished(resident, ids, which, 1000)
    assert_untouched(resident, before)


def finished(resident: ResidentModel, ids: tuple[int, ...], which: int, last: int) -> bool:
    """Whether the request got past its first `last` checkpoints."""
    calls = count()

    def check_cancelled() -> None:
        if next(calls) >= last:
            raise StopError

    request = list(requests(resident, ids, check_cancelled))[which]
    try:
        list(request)
    except StopError:
        return False
    return True


def test_a_request_that_is_dropped_changes_nothing(load_example: LoadExample) -> None:
    """The reader leaves after the header."""
    resident, ids = load_example("gpt2").resident, tuple(prompt("gpt2", 4))
    before = bits(resident)
    for request in requests(resident, ids, lambda: None):
        next(request)
        del request
        assert_untouched(resident, before)

"""Requests that pause for each other get bit-identical results to those of requests alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

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
from januslens_server.results import NAMED_KINDS
from januslens_server.specs import (
    DescentStep,
    FindNeuronsSpec,
    ForwardShift,
    GradientLensSpec,
    NegativeLogLikelihood,
    PreviewEditSpec,
    Probe,
    TraceSpec,
)
from tests.reference.examples import LoadExample, prompt
from tests.support.in_process import hooks_of
from tests.support.results import same

Request = Callable[[ResidentModel], Iterator[object]]


def go_on() -> None:
    pass


def requests(name: str) -> dict[str, Request]:
    """One request of every pipeline, each with several steps."""
    ids = tuple(prompt(name, 12))
    probes = (Probe("", ids[:5], None), Probe("", ids[3:], None))
    loss = NegativeLogLikelihood((7,))
    return {
        "trace": lambda m: trace(
            resolve_trace(
                m, TraceSpec(ids, all_positions=True, include_vectors=True, include_checks=True)
            ),
            go_on,
        ),
        "gradient": lambda m: gradient_lens(
            resolve_gradient_lens(m, GradientLensSpec(ids, loss, NAMED_KINDS, verify=True)),
            go_on,
        ),
        "descent": lambda m: preview_edit(
            resolve_preview_edit(m, PreviewEditSpec(ids, (9,), DescentStep((), (), 0.1), probes)),
            go_on,
        ),
        "shift": lambda m: preview_edit(
            resolve_preview_edit(m, PreviewEditSpec(ids, (9,), ForwardShift(1, 0.3), probes)), go_on
        ),
        "neurons": lambda m: find_neurons(
            resolve_find_neurons(m, FindNeuronsSpec((9,), False, (), 0, 20)), go_on
        ),
    }


def fresh(model: ResidentModel) -> ResidentModel:
    """A model without earlier requests, which indexes 20 neurons at a time."""
    lens = model.view.lens
    chunk_bytes = 20 * 4 * lens.unembedding.vocab
    return replace(model, view=replace(model.view, lens=replace(lens, chunk_bytes=chunk_bytes)))


@pytest.mark.parametrize("name", ["gpt2", "llama_grouped"])
def test_requests_in_alternating_steps_give_unchanged_results(
    name: str, load_example: LoadExample
) -> None:
    resident = load_example(name).resident
    asked = requests(name)
    alone = {kind: list(request(fresh(resident))) for kind, request in asked.items()}
    assert min(map(len, alone.values())) >= 6
    shared = fresh(resident)
    # Each twice, so that two requests of a kind alternate their steps.
    running = {(kind, i): asked[kind](shared) for i in range(2) for kind in asked}
    found: dict[tuple[str, int], list[object]] = {key: [] for key in running}
    while running:
        for key, steps in list(running.items()):
            try:
                found[key].append(next(steps))
            except StopIteration:
                del running[key]
            assert hooks_of(resident.network) == 0
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
    for (kind, _), results in found.items():
        expected, got = (
            [r for r in records if r is not None] for records in (alone[kind], results)
        )
        assert same(expected, got), kind

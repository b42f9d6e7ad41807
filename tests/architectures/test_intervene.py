"""Compare the experiments of Intervene with each of them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from januslens_server.errors import InvalidRequest, RequestCancelled, never_cancelled
from januslens_server.pipelines.experiments import MAX_EXPERIMENTS
from januslens_server.pipelines.intervene import intervene
from januslens_server.pipelines.resolve import resolve_intervene
from januslens_server.results import ExperimentEffect, ExperimentEffects, InterveneHeader
from januslens_server.specs import (
    Add,
    BlockSources,
    ExperimentSpec,
    InterveneSpec,
    InterventionSpec,
    Noise,
    Operation,
    PatchFrom,
    Scale,
    SetTo,
    Site,
    SweepSpec,
    TraceSpec,
    Zero,
)
from tests.architectures.cases import COMBINED, MIXTURES, Case
from tests.architectures.test_interventions import (
    LLAMA,
    OTHER_PROMPT,
    at,
    every_family,
    logits,
    shape_of,
    writable,
)
from tests.architectures.tiny_models import resident
from tests.reference.traces import run_trace

TARGET, OTHER = 7, 11
ONES = np.ones(32, np.float32)
NEURON_VALUES = np.random.default_rng(2).normal(size=(2, 2, 3)).astype(np.float32)


def run(case: Case, spec: InterveneSpec) -> tuple[InterveneHeader, dict[int, ExperimentEffect]]:
    header, *events = intervene(resolve_intervene(resident(case), spec), never_cancelled)
    assert isinstance(header, InterveneHeader)
    batches = [event for event in events if isinstance(event, ExperimentEffects)]
    effects = {effect.experiment: effect for batch in batches for effect in batch.effects}
    assert sorted(effects) == list(range(header.experiments))
    return header, effects


# Of the largest logit. An error of a logit is a relative error of its probability.
BATCHED = 1e-5


def assert_alone(case: Case, effect: ExperimentEffect, *interventions: InterventionSpec) -> None:
    """Compare an effect with the logits of a pass with these interventions only."""
    before, after = (logits(case, *changes).double() for changes in ((), interventions))
    for outcome in effect.after:
        p, q = (rows[outcome.position].log_softmax(-1) for rows in (before, after))
        row = after[outcome.position]
        error = BATCHED * float(row.abs().max())
        assert outcome.target_logit == pytest.approx(float(row[TARGET]), rel=0, abs=error)
        expected = float(q[TARGET].exp())
        assert outcome.target_probability == pytest.approx(expected, rel=2 * error)
        difference = float(row[TARGET] - row[OTHER])
        assert outcome.logit_difference == pytest.approx(difference, rel=0, abs=2 * error)
        assert outcome.target_rank == int((row > row[TARGET]).sum())
        divergence = float((p.exp() * (p - q)).sum())
        assert outcome.kl_nats == pytest.approx(divergence, rel=0, abs=2 * error)
        assert outcome.top_token_ids[0] == int(row.argmax())
        expected = float(q.max().exp())
        assert outcome.top_probabilities[0] == pytest.approx(expected, rel=2 * error)


@every_family
def test_experiments_of_a_batch_equal_each_alone(case: Case) -> None:
    embedding = at(Site.EMBEDDING, Noise(0.5, 3), positions=(1, 2))
    experiments = [
        (at(Site.HEAD_RESULT, Zero(), layers=(1,), heads=(1,)),),
        (at(Site.BLOCK_OUTPUT, PatchFrom(OTHER_PROMPT), layers=(0,), positions=(4,)),),
        (at(Site.ATTENTION_PATTERN, BlockSources(), layers=(1,), positions=(8,), sources=(7,)),),
        (at(Site.MLP_OUTPUT, Scale(-1.0), layers=(1,), positions=(8, 3)),),
        (embedding, at(Site.VALUE, Zero(), layers=(1,), positions=(0,))),
        (at(Site.ATTENTION_PATTERN, BlockSources(), layers=(1,), positions=(5, 8), sources=(4,)),),
        (),
    ]
    spec = InterveneSpec(
        tuple(case.prompt),
        target=(TARGET,),
        other=(OTHER,),
        positions=(-1, 5),
        experiments=tuple(ExperimentSpec(str(i), own) for i, own in enumerate(experiments)),
    )
    header, effects = run(case, spec)
    assert header.at_once > len(experiments)
    assert header.positions == (5, 8)
    assert [outcome.kl_nats for outcome in header.before] == pytest.approx([0, 0], abs=1e-6)
    for number, effect in effects.items():
        assert effect.label == str(number)
        assert_alone(case, effect, *experiments[number])


def test_copies_attend_to_the_sources_that_the_indexer_of_a_skipped_block_chose() -> None:
    case = next(case for case in COMBINED if case.family == "glm_moe_dsa")
    experiments = [
        (at(Site.MLP_OUTPUT, Scale(-1.0), layers=(1,), positions=(place,)),) for place in (5, 2)
    ] + [(at(Site.HEAD_RESULT, Zero(), layers=(1,), heads=(1,)),)]
    spec = InterveneSpec(
        tuple(case.prompt),
        target=(TARGET,),
        other=(OTHER,),
        positions=(-1, 4),
        experiments=tuple(ExperimentSpec("", own) for own in experiments),
    )
    _, effects = run(case, spec)
    for number, effect in effects.items():
        assert_alone(case, effect, *experiments[number])


def test_a_sweep_restores_what_always_corrupts() -> None:
    """ROME's causal trace: noise at the subject, restored by layer and position."""
    corrupt = at(Site.EMBEDDING, Noise(2.0, 1), positions=(2, 3))
    restore = at(Site.BLOCK_OUTPUT, PatchFrom(tuple(LLAMA.prompt)))
    spec = InterveneSpec(
        tuple(LLAMA.prompt),
        target=(TARGET,),
        other=(OTHER,),
        always=(corrupt,),
        sweep=SweepSpec(restore, by_layer=True, by_position=True),
    )
    _, effects = run(LLAMA, spec)
    assert len(effects) == 18
    for number, effect in effects.items():
        place = effect.coordinates
        assert (place.layer, place.position) == divmod(number, 9)
        where = {"layers": (number // 9,), "positions": (number % 9,)}
        assert_alone(LLAMA, effect, corrupt, at(restore.site, restore.operation, **where))


OF_EXPERTS = {"layers": (1,), "experts": (2, 0), "neurons": (15, 3, 7)}


@pytest.mark.parametrize(
    ("template", "axes"),
    [
        (at(Site.NEURONS, Zero(), layers=(1,), neurons=(3, 30, 7)), "by_unit"),
        (at(Site.NEURONS, Scale(-2.0), **OF_EXPERTS), "by_unit"),
        (at(Site.NEURONS, SetTo(NEURON_VALUES), positions=(8, 2), **OF_EXPERTS), "by_position"),
        (at(Site.BLOCK_OUTPUT, SetTo(np.stack([ONES, -ONES])), positions=(8, 2)), "by_position"),
        (at(Site.BLOCK_OUTPUT, Add(ONES), layers=(0, 1)), "by_layer"),
        (at(Site.HEAD_RESULT, Scale(-1.0), positions=(8,), layers=(0,)), "by_unit"),
        (
            at(Site.ATTENTION_PATTERN, BlockSources(), positions=(8, 5), sources=(1, 4, 0)),
            "by_source",
        ),
    ],
    ids=str,
)
def test_a_sweep_equals_its_experiments(template: InterventionSpec, axes: str) -> None:
    case = MIXTURES[0] if template.experts else LLAMA
    spec = InterveneSpec(
        tuple(case.prompt),
        target=(TARGET,),
        other=(OTHER,),
        sweep=SweepSpec(template, **{axes: True}),
    )
    _, effects = run(case, spec)
    for number, effect in effects.items():
        alone = dict(vars(template))
        if axes == "by_source":
            assert effect.coordinates.source_position == template.sources[number]
            alone["sources"] = (template.sources[number],)
        elif template.site is Site.HEAD_RESULT:
            assert effect.coordinates.head == number
            alone["heads"] = (number,)
        elif axes == "by_unit":
            assert effect.coordinates.neuron == template.neurons[number]
            alone["neurons"] = (template.neurons[number],)
        elif axes == "by_position":
            assert effect.coordinates.position == template.positions[number]
            alone["positions"] = (template.positions[number],)
            assert isinstance(template.operation, SetTo)
            alone["operation"] = SetTo(template.operation.values[number])
        else:
            alone["layers"] = (effect.coordinates.layer,)
        assert_alone(case, effect, InterventionSpec(**alone))


def test_a_layer_window_changes_its_neighbours_as_well() -> None:
    template = at(Site.MLP_OUTPUT, Zero())
    sweep = SweepSpec(template, by_layer=True, layer_window=2)
    spec = InterveneSpec(tuple(LLAMA.prompt), target=(TARGET,), other=(OTHER,), sweep=sweep)
    _, effects = run(LLAMA, spec)
    assert_alone(LLAMA, effects[0], at(Site.MLP_OUTPUT, Zero(), layers=(0,)))
    assert_alone(LLAMA, effects[1], at(Site.MLP_OUTPUT, Zero(), layers=(0, 1)))


def test_cancelled_experiments_stop_within_a_layer() -> None:
    """Batches of many tokens are checked before each operation, not only before each layer."""
    heads = SweepSpec(at(Site.HEAD_RESULT, Zero()), by_layer=True, by_position=True, by_unit=True)
    spec = InterveneSpec(tuple(LLAMA.prompt), sweep=heads)
    block = resident(LLAMA).view.blocks[0].module
    reached: list[tuple[str, int]] = []

    def check() -> None:
        if any(copies > 1 for _, copies in reached):
            raise RequestCancelled("the caller cancelled the request")

    def record(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda _module, _args, output: reached.append((name, len(output)))

    handles = [
        block.get_submodule(name).register_forward_hook(record(name))
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    ]
    try:
        with pytest.raises(RequestCancelled):
            list(intervene(resolve_intervene(resident(LLAMA), spec), check))
    finally:
        for handle in handles:
            handle.remove()
    assert reached == [
        ("self_attn.q_proj", 1),
        ("self_attn.k_proj", 1),
        ("mlp.down_proj", 1),
        ("self_attn.q_proj", 36),
    ]


def test_the_target_is_the_prediction_before_if_none_is_named() -> None:
    spec = InterveneSpec(
        tuple(LLAMA.prompt), experiments=(ExperimentSpec("", (at(Site.MLP_OUTPUT, Zero()),)),)
    )
    header, effects = run(LLAMA, spec)
    (before,), (after,) = header.before, effects[0].after
    assert before.target_token_id == int(logits(LLAMA)[-1].argmax()) == after.target_token_id
    assert (before.target_rank, before.logit_difference) == (0, None)


def mixed_experiments(case: Case, count: int) -> list[ExperimentSpec]:
    """Experiments of every operation, over all sites, layers and positions."""
    shapes = {site: shape_of(case, site) for site in writable(case)}
    experiments = []
    for number in range(count):
        site = list(shapes)[number % len(shapes)]
        ones = np.ones(shapes[site], np.float32)
        operations = (Zero(), Scale(-1.5), SetTo(ones), Add(ones, 0.3), Noise(0.5, number))
        operation: Operation = (*operations, PatchFrom(OTHER_PROMPT))[number % 6]
        where: dict[str, Any] = {"positions": (number % len(case.prompt),)}
        if site is not Site.EMBEDDING:
            where["layers"] = (number // 6 % 2,)
        changes = [at(site, operation, **where)]
        if number % 4 == 0:
            hidden = {"positions": (8,), "sources": (number % 8,), "layers": (1,)}
            changes.append(at(Site.ATTENTION_PATTERN, BlockSources(), **hidden))
        experiments.append(ExperimentSpec("", tuple(changes)))
    return experiments


def test_thousand_experiments_leave_weights_and_traces_as_they_were() -> None:
    case = LLAMA
    network = resident(case).network
    weights = {name: parameter.clone() for name, parameter in network.named_parameters()}
    plain_trace = TraceSpec(tuple(case.prompt), include_vectors=True)
    before = run_trace(resident(case), plain_trace)
    experiments = mixed_experiments(case, 1000)
    for first in range(0, 1000, 500):  # a trace between two requests
        part = tuple(experiments[first : first + 500])
        run(case, InterveneSpec(tuple(case.prompt), experiments=part))
        between = run_trace(resident(case), plain_trace)
        assert between.edges == before.edges
        for old, new in zip(before.graphs, between.graphs, strict=True):
            assert old.vectors is not None
            assert new.vectors is not None
            assert old.vectors.tobytes() == new.vectors.tobytes()
            assert old.projections.top_logits.tobytes() == new.projections.top_logits.tobytes()
    assert not any("forward" in vars(block.module) for block in resident(case).view.blocks)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "experiments: no experiments given"),
        (
            {"sweep": SweepSpec(at(Site.MLP_OUTPUT, Zero()), by_unit=True)},
            "sweep: MLP_OUTPUT has neither heads nor neurons",
        ),
        (
            {"sweep": SweepSpec(at(Site.QUERY, Zero()), by_source=True)},
            "sweep.by_source: QUERY has no sources",
        ),
        (
            {"sweep": SweepSpec(at(Site.QUERY, Zero()), layer_window=3)},
            "sweep.layer_window: expected",
        ),
        ({"sweep": SweepSpec(at(Site.LOGITS, Zero()))}, "sweep.template.site: LOGITS can only"),
        (
            {"experiments": (ExperimentSpec("", (at(Site.QUERY, Zero(), heads=(9,)),)),)},
            r"experiments\[0\].interventions\[0\].heads: QUERY has no head 9",
        ),
        ({"always": (at(Site.QUERY, Zero(), layers=(5,)),)}, r"always\[0\].layers: .* no layer 5"),
    ],
    ids=str,
)
def test_requests_that_do_not_fit_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        run(LLAMA, InterveneSpec(tuple(LLAMA.prompt), **fields))  # type: ignore[arg-type]


def test_too_many_experiments_are_refused_before_they_are_made() -> None:
    ids = tuple(range(1, 33))
    sweep = SweepSpec(at(Site.NEURONS, Zero()), by_layer=True, by_position=True, by_unit=True)
    assert MAX_EXPERIMENTS >= 2 * 32 * 40
    many = ExperimentSpec("", ())
    spec = InterveneSpec(ids, sweep=sweep, experiments=(many,) * (MAX_EXPERIMENTS - 2559))
    with pytest.raises(InvalidRequest, match="too many experiments: expected at most 16384"):
        run(LLAMA, spec)

"""Generation under interventions, against plain models that hooks change token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from januslens_server.errors import InvalidRequest, never_cancelled
from januslens_server.models.decoding import Decoder
from januslens_server.models.runner import forward, generation_changes, prepared
from januslens_server.pipelines.cost import demand_of
from januslens_server.pipelines.generate import generate
from januslens_server.pipelines.interventions import read_interventions
from januslens_server.pipelines.resolve import resolve_generate
from januslens_server.results import GeneratedToken
from januslens_server.specs import (
    Add,
    BlockSources,
    GenerateSpec,
    InterventionSpec,
    LayerReading,
    MeanOver,
    Noise,
    PatchFrom,
    Sampling,
    Scale,
    SetTo,
    Site,
    Zero,
)
from tests.architectures.cases import CASES, MIXTURES, Case
from tests.architectures.tiny_models import plain, resident
from tests.reference.interventions import (
    FAMILIES,
    Change,
    HookedModel,
    add,
    block,
    scale,
    set_to,
    zero,
)

NEW = 4
ONE_PER_FAMILY = {
    case.family: case for case in reversed(CASES + MIXTURES) if case.family in FAMILIES
}.values()
every_family = pytest.mark.parametrize("case", ONE_PER_FAMILY, ids=lambda case: case.id)
LLAMA = next(case for case in CASES if case.id == "llama-grouped")
WINDOWED = next(case for case in CASES if case.family == "mistral")


def made(case: Case, *interventions: InterventionSpec, **options: Any) -> list[GeneratedToken]:
    spec = GenerateSpec(tuple(case.prompt), NEW, interventions=interventions, **options)
    events = generate(resolve_generate(resident(case), spec), never_cancelled)
    return [event for event in events if isinstance(event, GeneratedToken)]


def token_by_token(
    hooked: HookedModel, case: Case, changes: Sequence[Change]
) -> list[tuple[int, float]]:
    """Greedy ids and their log-probabilities, each from a pass over all tokens so far."""
    ids, found = list(case.prompt), []
    for _ in range(NEW):
        logits = hooked.run(ids, changes)["LOGITS", None][-1].float()
        ids.append(int(logits.argmax()))
        found.append((ids[-1], float(logits.log_softmax(-1)[ids[-1]])))
    return found


def pairs_of_changes(case: Case) -> list[list[tuple[InterventionSpec, Change]]]:
    """Several sets of interventions, each with the same changes for a hooked model."""
    model = resident(case)
    width = model.view.facts.d_model
    vector = np.random.default_rng(5).normal(size=width).astype(np.float32)
    tensor = torch.from_numpy(vector)

    def pair(site: Site, ours: Any, theirs: Any, **where: Any) -> tuple[InterventionSpec, Change]:
        named = dict(where)
        if "experts" in where:
            named |= {"heads": named.pop("experts"), "sources": named.pop("neurons")}
        elif "neurons" in where:
            named |= {"heads": named.pop("neurons")}
        return InterventionSpec(site, ours, **where), Change(site.name, theirs, **named)

    sources = {"layers": (1,), "heads": (1, 2), "sources": (3, 6, 8)}
    neurons = {"experts": (2, 0, 3), "neurons": (1, 9, 4, 5)}
    routed = [
        pair(Site.ROUTER, Scale(-1.0), scale(-1.0), layers=(0,)),
        pair(Site.NEURONS, Scale(-4.0), scale(-4.0), layers=(0,), **neurons),
    ]
    return [
        [
            pair(Site.HEAD_RESULT, Zero(), zero(), layers=(0,), heads=(1,)),
            pair(Site.BLOCK_OUTPUT, Add(vector, 0.5), add(tensor, 0.5), layers=(0,)),
            pair(Site.VALUE, Scale(2.0), scale(2.0), layers=(1,), positions=(2, 5)),
        ],
        [
            pair(Site.ATTENTION_PATTERN, BlockSources(), block(), **sources),
            pair(Site.KEY, Scale(-0.7), scale(-0.7), layers=(1,), positions=(1,)),
            pair(Site.MLP_OUTPUT, SetTo(vector), set_to(tensor), layers=(1,), positions=(4,)),
        ],
        [
            pair(Site.QUERY, Scale(1.5), scale(1.5)),
            pair(Site.EMBEDDING, Add(vector, 0.3), add(tensor, 0.3)),
            pair(Site.ATTENTION_OUTPUT, Scale(0.5), scale(0.5), layers=(1,)),
        ],
        routed
        if case.family in {other.family for other in MIXTURES}
        else [pair(Site.NEURONS, Zero(), zero(), layers=(0,), neurons=(1, 3, 4))],
    ]


@every_family
def test_changed_generation_equals_hooks_token_by_token(case: Case) -> None:
    hooked, unchanged = HookedModel(plain(case)), made(case)
    for pairs in pairs_of_changes(case):
        expected = token_by_token(hooked, case, [change for _, change in pairs])
        found = made(case, *(intervention for intervention, _ in pairs))
        assert [token.token.id for token in found] == [token_id for token_id, _ in expected]
        for token, (_, log_probability) in zip(found, expected, strict=True):
            assert token.log_probability == pytest.approx(log_probability, abs=3e-5)
        effects = (
            abs(token.log_probability - before.log_probability)
            for token, before in zip(found, unchanged, strict=True)
        )
        assert max(effects) > 1e-3


def everything(case: Case) -> tuple[InterventionSpec, ...]:
    """Every operation that may apply to generated tokens, and some at named positions."""
    width = resident(case).view.facts.d_model
    vector = np.linspace(-1, 1, width, dtype=np.float32)
    others = (tuple(range(3, 12)), (5, 17, 42))
    hidden = {"layers": (1,), "sources": (3, 6)}
    return (
        InterventionSpec(Site.EMBEDDING, Noise(0.2, 7)),
        InterventionSpec(Site.HEAD_RESULT, Zero(), layers=(0,), heads=(1,)),
        InterventionSpec(Site.HEAD_RESULT, MeanOver(others), layers=(0,), heads=(2,)),
        InterventionSpec(Site.BLOCK_OUTPUT, Add(vector), layers=(0,)),
        InterventionSpec(Site.BLOCK_OUTPUT, Noise(0.1, 3), layers=(0,), positions=(2, 4)),
        InterventionSpec(Site.KEY, Scale(0.5), layers=(1,)),
        InterventionSpec(Site.MLP_OUTPUT, PatchFrom(others[1]), layers=(1,), positions=(1, 2)),
        InterventionSpec(Site.ATTENTION_PATTERN, BlockSources(), **hidden),
    )


@pytest.mark.parametrize("case", [LLAMA, WINDOWED, *MIXTURES], ids=lambda case: case.id)
def test_steps_with_a_cache_equal_changed_passes_without(case: Case) -> None:
    model, specs = resident(case), everything(case)
    layers = range(model.view.facts.n_layers)
    ids = list(range(20, 20 + len(case.prompt)))
    changes = generation_changes(
        model,
        read_interventions(model, specs, len(ids), generating=True),
        never_cancelled,
    )
    decoder = Decoder(model, layers, never_cancelled, changes)
    fed = ids
    for _ in range(NEW):
        logits, outputs = decoder.feed(fed)
        # Positions of the prompt alone were named from its start, so they stay the same.
        whole_pass = prepared(
            model, read_interventions(model, specs, len(ids)), len(ids), never_cancelled
        )
        last = (len(ids) - 1,)
        whole = forward(model, ids, layers, never_cancelled, last, last, whole_pass)
        close(logits, whole.logits[0].float())
        close(outputs[-1], whole.residual[-1])
        fed = [int(logits.argmax())]
        ids += fed


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_generations_in_turns_do_not_share_interventions() -> None:
    zeroed = InterventionSpec(Site.MLP_OUTPUT, Zero())
    scaled = InterventionSpec(Site.HEAD_RESULT, Scale(3.0))
    sets: list[tuple[InterventionSpec, ...]] = [(), (zeroed,), (scaled,), everything(LLAMA)]
    alone = [[token.log_probability for token in made(LLAMA, *each)] for each in sets]
    running = []
    for each in sets:
        spec = GenerateSpec(tuple(LLAMA.prompt), NEW, interventions=each)
        running.append(generate(resolve_generate(resident(LLAMA), spec), never_cancelled))
    together: list[list[float]] = [[] for _ in sets]
    for step in zip(*running, strict=True):
        for found, event in zip(together, step, strict=True):
            if isinstance(event, GeneratedToken):
                found.append(event.log_probability)
    assert together == alone
    assert len({tuple(found) for found in alone}) == len(sets)


def test_interventions_that_change_nothing_leave_every_bit() -> None:
    vector = np.zeros(resident(LLAMA).view.facts.d_model, np.float32)
    nothing = [
        InterventionSpec(Site.BLOCK_OUTPUT, Add(vector)),
        InterventionSpec(Site.QUERY, Scale(1.0)),
        InterventionSpec(Site.EMBEDDING, Noise(0.0, 1)),
    ]
    sampling = Sampling(1.0, seed=4)
    expected = made(LLAMA, sampling=sampling, reading=LayerReading())
    assert made(LLAMA, *nothing, sampling=sampling, reading=LayerReading()) == expected


@pytest.mark.parametrize(
    ("intervention", "text"),
    [
        (
            InterventionSpec(Site.MLP_OUTPUT, PatchFrom(tuple(LLAMA.prompt))),
            r"interventions\[0\].positions: the other prompt has no values for generated tokens",
        ),
        (
            InterventionSpec(Site.MLP_OUTPUT, SetTo(np.ones((9, 32), np.float32))),
            r"set.shape: the tensor has values for 9 positions, but generated tokens change",
        ),
        (
            InterventionSpec(Site.MLP_OUTPUT, Zero(), positions=(9,)),
            r"positions: position 9 is outside the prompt; expected -9 to 8",
        ),
    ],
)
def test_interventions_that_do_not_fit_are_refused(
    intervention: InterventionSpec, text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        made(LLAMA, intervention)


def test_cost_includes_other_prompts_and_hidden_sources() -> None:
    def demand(*interventions: InterventionSpec) -> Any:
        spec = GenerateSpec(tuple(LLAMA.prompt), NEW, interventions=interventions)
        return demand_of(resolve_generate(resident(LLAMA), spec))

    plain_demand = demand()
    mean = demand(InterventionSpec(Site.MLP_OUTPUT, MeanOver(((1, 2, 3), (4, 5)))))
    hidden = InterventionSpec(Site.ATTENTION_PATTERN, BlockSources(), sources=(3,))
    throughout, in_prompt = demand(hidden), demand(replace(hidden, positions=(5,)))
    assert mean.passes == plain_demand.passes + 2
    assert mean.held > plain_demand.held
    assert throughout.held > in_prompt.held == plain_demand.held
    assert throughout.flops > in_prompt.flops > plain_demand.flops

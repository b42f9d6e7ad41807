"""Compare operations at every site with plain Hugging Face models that hooks change.

`test_interventions.py` has zeros and blocked sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.errors import RequestCancelled, never_cancelled
from januslens_server.models import interventions
from januslens_server.models.interventions import Interventions
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.resolve import resolve_activations
from januslens_server.results import SiteValues
from januslens_server.specs import (
    ActivationsSpec,
    Add,
    BlockSources,
    InterventionSpec,
    MeanOver,
    Noise,
    Operation,
    PatchFrom,
    Scale,
    SetTo,
    Site,
)
from tests.architectures.cases import CASES, MIXTURES, VOCABULARY, Case
from tests.architectures.test_sites import joined
from tests.architectures.tiny_models import plain, resident
from tests.reference.interventions import (
    Change,
    HookedModel,
    Values,
    add,
    block,
    scale,
    set_to,
    take_from,
    zero,
)

every_family = pytest.mark.parametrize(
    "case",
    {case.family: case for case in reversed(CASES + MIXTURES)}.values(),
    ids=lambda case: case.id,
)
CHANGED = [
    Site.EMBEDDING,
    Site.QUERY,
    Site.KEY,
    Site.VALUE,
    Site.HEAD_RESULT,
    Site.ATTENTION_OUTPUT,
    Site.RESIDUAL_MID,
    Site.NEURONS,
    Site.ROUTER,
    Site.MLP_OUTPUT,
    Site.BLOCK_OUTPUT,
]
LLAMA = next(case for case in CASES if case.id == "llama-grouped")
WITH_HEADS = {Site.QUERY, Site.KEY, Site.VALUE, Site.HEAD_RESULT}
POSITIONS = (6, 3)  # not ascending: values and source positions belong to them in this order
SOURCE_POSITIONS = (2, 7)

# The operation of the server, and that of the hooks.
Pair = tuple[Operation, Callable[[Any, Tensor], Tensor]]


def other_prompts(case: Case) -> list[list[int]]:
    return [[(token * k + 3) % VOCABULARY for token in case.prompt] for k in (7, 11)]


def logits(case: Case, *changes: InterventionSpec) -> Tensor:
    spec = ActivationsSpec(tuple(case.prompt), (Site.LOGITS,), interventions=changes)
    events = activations(resolve_activations(resident(case), spec), never_cancelled)
    return joined([event for event in events if isinstance(event, SiteValues)])


def operations(case: Case, change: Change, own: Values, others: list[Values]) -> Iterator[Pair]:
    """The operations at the place of `change`; `own` and `others` are unchanged passes."""
    key = (change.site, None if change.site == "EMBEDDING" else 1)
    selected = own[key][change.index(own[key])]
    drawn = torch.randn(selected.shape, generator=torch.Generator().manual_seed(3))
    yield Scale(-0.5), scale(-0.5)
    yield SetTo(drawn.numpy()), set_to(drawn)
    yield Add(drawn[0].numpy(), 0.7), add(drawn[0], 0.7)  # the same at both positions
    first, second = other_prompts(case)
    there = replace(change, layers=(), positions=SOURCE_POSITIONS)
    yield PatchFrom(tuple(first), SOURCE_POSITIONS), take_from(others[0], there)
    mean = {key: (others[0][key] + others[1][key]) / 2}
    yield MeanOver((tuple(first), tuple(second))), take_from(mean, change)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(own[key].shape, generator=generator)[change.index(own[key])]
    yield Noise(0.4, 5), add(noise, 0.4)


@every_family
def test_operations_at_every_site_equal_those_of_hooks(case: Case) -> None:
    hooked = HookedModel(plain(case))
    own = hooked.run(case.prompt)
    others = [hooked.run(prompt) for prompt in other_prompts(case)]
    mixed = (Site.ROUTER.name, 1) in own
    for site in CHANGED:
        layer = None if site is Site.EMBEDDING else 1
        if (site.name, layer) not in own:
            continue
        layers = () if layer is None else (layer,)
        place = Change(site.name, zero(), layers, POSITIONS)
        units: dict[str, tuple[int, ...]] = {}
        if site in WITH_HEADS:
            units = {"heads": (own[site.name, layer].shape[1] - 1,)}
            place = replace(place, heads=units["heads"])
        elif mixed and site is Site.NEURONS:
            units = {"experts": (3, 0, 2), "neurons": (7, 1, 4)}
            place = replace(place, heads=units["experts"], sources=units["neurons"])
        for operation, expected in operations(case, place, own, others):
            change = replace(place, operation=expected)
            found = logits(case, InterventionSpec(site, operation, layers, POSITIONS, **units))
            assert_near(found, hooked.run(case.prompt, [change])["LOGITS", None], operation)


@every_family
def test_several_interventions_apply_in_their_order(case: Case) -> None:
    hooked = HookedModel(plain(case))
    vector = np.linspace(-1, 1, resident(case).view.facts.d_model, dtype=np.float32)
    added = torch.from_numpy(vector)
    scaled = InterventionSpec(Site.BLOCK_OUTPUT, Scale(0.5), (0,))
    moved = InterventionSpec(Site.BLOCK_OUTPUT, Add(vector), (0,), (5, -1))
    hidden = InterventionSpec(Site.ATTENTION_PATTERN, BlockSources(), (1,), (8,), sources=(2, 6))
    changes = [
        Change("BLOCK_OUTPUT", scale(0.5), [0]),
        Change("BLOCK_OUTPUT", add(added), [0], [5, 8]),
        Change("ATTENTION_PATTERN", block(), [1], [8], sources=[2, 6]),
    ]
    expected = hooked.run(case.prompt, changes)["LOGITS", None]
    assert_near(logits(case, scaled, moved, hidden), expected, "in order")
    reverse = hooked.run(case.prompt, [changes[1], changes[0], changes[2]])["LOGITS", None]
    assert_near(logits(case, moved, scaled, hidden), reverse, "in reverse")
    assert (expected - reverse).abs().max() > 1e-3


def assert_near(found: Tensor, expected: Tensor, what: object) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-3, atol=2e-4, msg=lambda text: f"{what}: {text}"
    )


def test_cancelled_request_stops_between_two_interventions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident(LLAMA)
    draws, randn = [], torch.randn

    def counted(*shape: Any, **options: Any) -> Tensor:
        draws.append(shape)
        return randn(*shape, **options)

    def check() -> None:
        if draws:
            raise RequestCancelled("the caller cancelled the request")

    monkeypatch.setattr(torch, "randn", counted)
    noises = tuple(InterventionSpec(Site.NEURONS, Noise(0.1, seed), (1,)) for seed in range(16))
    spec = ActivationsSpec(tuple(LLAMA.prompt), (Site.LOGITS,), interventions=noises)
    with pytest.raises(RequestCancelled):
        list(activations(resolve_activations(model, spec), check))
    assert len(draws) == 1


def test_noise_drawn_in_blocks_is_that_of_the_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interventions, "DRAWN_AT_ONCE", 100)
    for length, positions in ((9, (8, 2)), (47, (46, 0, 31)), (100, (99, 0, 40, 41)), (99, (3,))):
        changes = Interventions(resident(LLAMA), [], length, {}, never_cancelled)
        whole = torch.randn(length, 5, generator=torch.Generator().manual_seed(3))
        drawn = changes._drawn(torch.Generator().manual_seed(3), positions, torch.Size([5]))
        assert torch.equal(drawn, whole[list(positions)])


def test_hidden_sources_in_blocks_of_queries_equal_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Site.ATTENTION_PATTERN, BlockSources()
    hide = InterventionSpec(*place, positions=(3, 5, 8), sources=(2,))
    whole = logits(LLAMA, hide)
    monkeypatch.setattr(interventions, "PATTERN_AT_ONCE", 1)
    assert_near(logits(LLAMA, hide), whole, hide)

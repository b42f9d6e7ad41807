"""Compare interventions with plain Hugging Face models that hooks change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.errors import InvalidRequest, never_cancelled
from januslens_server.models.sites import READ_ONLY, sites_of_layer
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.interventions import read_interventions
from januslens_server.pipelines.resolve import (
    resolve_activations,
    resolve_gradient_lens,
    resolve_intervene,
    resolve_trace,
)
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    GradientHeader,
    GradientMatrix,
    MatrixKind,
    SiteValues,
    TraceSummary,
)
from januslens_server.specs import (
    ActivationsSpec,
    Add,
    BlockSources,
    ExperimentSpec,
    GradientLensSpec,
    InterveneSpec,
    InterventionSpec,
    MeanOver,
    NegativeLogLikelihood,
    Noise,
    Operation,
    PatchFrom,
    Scale,
    Selection,
    SetTo,
    Site,
    SweepSpec,
    TraceSpec,
    Zero,
)
from tests.architectures.cases import CASES, MIXTURES, WITHOUT_ADAPTER, Case
from tests.architectures.test_sites import joined
from tests.architectures.tiny_models import plain, resident
from tests.reference.interventions import FAMILIES, Change, HookedModel, Values, block, zero

ALL_CASES = CASES + MIXTURES + WITHOUT_ADAPTER
every_family = pytest.mark.parametrize(
    "case", {case.family: case for case in reversed(ALL_CASES)}.values(), ids=lambda case: case.id
)
OTHER_PROMPT = (5, 17, 42, 8, 99, 3, 61, 70, 12)


def logits(case: Case, *interventions: InterventionSpec) -> Tensor:
    """The logits `[pos, vocab]` under interventions."""
    spec = ActivationsSpec(tuple(case.prompt), (Site.LOGITS,), interventions=interventions)
    request = resolve_activations(resident(case), spec)
    events = list(activations(request, never_cancelled))
    return joined([event for event in events if isinstance(event, SiteValues)])


def writable(case: Case) -> list[Site]:
    """The sites of the first layer that can be changed other than by blocking sources."""
    sites = [Site.EMBEDDING, *sites_of_layer(resident(case), 0)]
    return [site for site in sites if site not in (*READ_ONLY, Site.ATTENTION_PATTERN)]


def at(site: Site, operation: Operation, **where: Any) -> InterventionSpec:
    return InterventionSpec(site, operation, **where)


@every_family
def test_interventions_that_change_nothing_leave_every_bit(case: Case) -> None:
    before, places = logits(case), writable_places(case)
    nothing = [Add(np.zeros(shape_of(case, *place), np.float32)) for place in places]
    operations: list[Sequence[Operation]] = [
        [Scale(1.0)] * len(places),
        nothing,
        [Noise(0.0, 1)] * len(places),
        [PatchFrom(tuple(case.prompt))] * len(places),
    ]
    for each in operations:
        changes = [
            at(site, operation, layers=layers)
            for (site, layers), operation in zip(places, each, strict=True)
        ]
        assert torch.equal(logits(case, *changes), before), each[0]


def writable_places(case: Case) -> list[tuple[Site, tuple[int, ...]]]:
    """The sites of `writable` in all layers, or layer by layer where their shapes may differ."""
    places: list[tuple[Site, tuple[int, ...]]] = []
    for site in writable(case):
        if site in {Site.KEY, Site.VALUE, Site.NEURONS}:
            places += [(site, (layer,)) for layer in resident(case).view.known]
        else:
            places.append((site, ()))
    return places


def shape_of(case: Case, site: Site, layers: tuple[int, ...] = ()) -> tuple[int, ...]:
    spec = ActivationsSpec(tuple(case.prompt), (site,), layers, positions=(0,))
    events = list(activations(resolve_activations(resident(case), spec), never_cancelled))
    return next(event.shape[1:] for event in events if isinstance(event, SiteValues))


HOOKED = [case for case in ALL_CASES if case.family in FAMILIES]


@pytest.mark.parametrize("case", HOOKED, ids=lambda case: case.id)
def test_zeroed_sites_give_the_logits_of_a_hooked_model(case: Case) -> None:
    hooked = HookedModel(plain(case))
    for site in writable(case):
        where: dict[str, Any] = {"positions": (2, 5)}
        if site is not Site.EMBEDDING:
            where["layers"] = (0,)
        expected = changed(hooked, case, Change(site.name, zero(), **where))
        found = logits(case, at(site, Zero(), **where))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=site.name)


@pytest.mark.parametrize("case", HOOKED, ids=lambda case: case.id)
def test_blocked_sources_give_the_logits_of_a_hooked_model(case: Case) -> None:
    hooked = HookedModel(plain(case))
    where: dict[str, Any] = {"layers": (1,), "positions": (4, 7), "heads": (1,)}
    sources = (3, 5, 6)
    expected = changed(hooked, case, Change("ATTENTION_PATTERN", block(), sources=sources, **where))
    found = logits(case, at(Site.ATTENTION_PATTERN, BlockSources(), sources=sources, **where))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def changed(hooked: HookedModel, case: Case, *changes: Change) -> Tensor:
    values: Values = hooked.run(case.prompt, changes)
    return values["LOGITS", None]


@every_family
def test_trace_of_a_changed_pass_conserves(case: Case) -> None:
    changes = []
    for site, layers in writable_places(case):
        vector = np.random.default_rng(site).normal(size=shape_of(case, site, layers)) * 0.3
        added = Add(vector.astype(np.float32))
        changes.append(at(site, added, layers=layers, positions=(-1, 3)))
    hidden = at(Site.ATTENTION_PATTERN, BlockSources(), sources=(6, 7), positions=(-1,))
    assert_conserves(case, (*changes, hidden))


def assert_conserves(case: Case, interventions: tuple[InterventionSpec, ...]) -> None:
    spec = TraceSpec(
        tuple(case.prompt),
        selection=Selection(heads=2, memory_values_per_head=2, top_neurons=3),
        include_checks=True,
        include_logit_contribution=True,
        interventions=interventions,
    )
    events = list(trace(resolve_trace(resident(case), spec), never_cancelled))
    (summary,) = (event for event in events if isinstance(event, TraceSummary))
    for check in summary.checks:
        assert check.measured_error < 1e-4, (interventions, check)


LLAMA = next(case for case in CASES if case.id == "llama-grouped")


def read(case: Case, site: Site, layer: int, *interventions: InterventionSpec) -> Tensor:
    spec = ActivationsSpec(
        tuple(case.prompt), (site,), layers=(layer,), interventions=interventions
    )
    events = list(activations(resolve_activations(resident(case), spec), never_cancelled))
    return joined([event for event in events if isinstance(event, SiteValues)])


def test_each_operation_gives_the_documented_values() -> None:
    shape = (2, *shape_of(LLAMA, Site.HEAD_RESULT)[1:])
    vector = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    where: dict[str, Any] = {"layers": (1,), "positions": (6, 2), "heads": (3, 0)}
    old = read(LLAMA, Site.HEAD_RESULT, 1)[[6, 2]][:, [3, 0]]
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn((9, *shape_of(LLAMA, Site.HEAD_RESULT)), generator=generator)
    tensor = torch.from_numpy(vector)
    expected: dict[Operation, Tensor] = {
        Zero(): torch.zeros_like(old),
        Scale(-0.5): old * -0.5,
        Noise(2.0, 7): old + 2 * drawn[[6, 2]][:, [3, 0]],
    }
    for operation, values in expected.items():
        found = read(LLAMA, Site.HEAD_RESULT, 1, at(Site.HEAD_RESULT, operation, **where))
        torch.testing.assert_close(found[[6, 2]][:, [3, 0]], values)
    for wide in (SetTo(vector), Add(vector, 0.25)):
        values = tensor.expand_as(old) if isinstance(wide, SetTo) else old + 0.25 * tensor
        found = read(LLAMA, Site.HEAD_RESULT, 1, at(Site.HEAD_RESULT, wide, **where))
        torch.testing.assert_close(found[[6, 2]][:, [3, 0]], values)


def of_prompt(ids: tuple[int, ...], site: Site, layer: int) -> Tensor:
    spec = ActivationsSpec(ids, (site,), layers=(layer,))
    events = list(activations(resolve_activations(resident(LLAMA), spec), never_cancelled))
    return joined([event for event in events if isinstance(event, SiteValues)])


def test_patches_and_means_take_values_of_other_prompts() -> None:
    site = Site.BLOCK_OUTPUT
    longer = (*OTHER_PROMPT, 33, 34)
    one, two = (of_prompt(ids, site, 0) for ids in (OTHER_PROMPT, longer))
    patched = read(LLAMA, site, 0, at(site, PatchFrom(OTHER_PROMPT), layers=(0,)))
    torch.testing.assert_close(patched, one)
    moved = at(site, PatchFrom(longer, (-1, 0)), layers=(0,), positions=(3, 8))
    torch.testing.assert_close(read(LLAMA, site, 0, moved)[[3, 8]], two[[10, 0]])
    own = of_prompt(tuple(LLAMA.prompt), site, 0)
    mean = at(site, MeanOver((OTHER_PROMPT, tuple(LLAMA.prompt))), layers=(0,), positions=(4,))
    torch.testing.assert_close(read(LLAMA, site, 0, mean)[4], (one[4] + own[4]) / 2)
    over_all = at(site, MeanOver((OTHER_PROMPT, longer)), layers=(0,), positions=(4,))
    expected = torch.cat([one[1:], two[1:]]).mean(0)
    torch.testing.assert_close(read(LLAMA, site, 0, over_all)[4], expected)


def test_two_interventions_at_one_place_apply_in_the_order_of_the_request() -> None:
    vector = np.ones(shape_of(LLAMA, Site.MLP_OUTPUT), np.float32)
    double, add = at(Site.MLP_OUTPUT, Scale(2.0)), at(Site.MLP_OUTPUT, Add(vector))
    old = read(LLAMA, Site.MLP_OUTPUT, 0)
    torch.testing.assert_close(read(LLAMA, Site.MLP_OUTPUT, 0, double, add), 2 * old + 1)
    torch.testing.assert_close(read(LLAMA, Site.MLP_OUTPUT, 0, add, double), 2 * (old + 1))


def test_gradients_are_those_of_the_changed_pass() -> None:
    """Zero some neurons, cut a patched residual, hide sources: factors equal the dense gradient."""
    changes = (
        at(Site.NEURONS, Zero(), layers=(1,), positions=(3, 8), neurons=(1, 2, 5)),
        at(Site.BLOCK_OUTPUT, PatchFrom(OTHER_PROMPT), layers=(0,), positions=(4,)),
        at(Site.QUERY, Scale(1.5), layers=(1,), heads=(2,)),
        at(Site.ATTENTION_PATTERN, BlockSources(), layers=(1,), positions=(8,), sources=(5, 6)),
    )
    plain_losses, losses = (gradient(changed_by) for changed_by in ((), changes))
    assert plain_losses != losses


def gradient(changes: tuple[InterventionSpec, ...]) -> float:
    """The loss of a pass, after a check of all its factors and of the loss by its logits."""
    spec = GradientLensSpec(
        tuple(LLAMA.prompt),
        NegativeLogLikelihood((7,)),
        matrices=(MatrixKind.Q, MatrixKind.V, MatrixKind.O, MatrixKind.GATE, MatrixKind.FF2),
        verify=True,
        interventions=changes,
    )
    request = resolve_gradient_lens(resident(LLAMA), spec)
    header, *matrices, _summary = gradient_lens(request, never_cancelled)
    assert isinstance(header, GradientHeader)
    assert len(matrices) == 10
    for matrix in matrices:
        assert isinstance(matrix, GradientMatrix)
        assert matrix.verification is not None
        assert matrix.verification.held, matrix
    expected = -logits(LLAMA, *changes)[-1].log_softmax(-1)[7]
    assert header.loss == pytest.approx(float(expected), rel=1e-5)
    return header.loss


def test_a_loss_that_no_weight_reaches_has_zero_gradients() -> None:
    nothing_left = (at(Site.BLOCK_OUTPUT, PatchFrom(OTHER_PROMPT), layers=(1,)),)
    gradient(nothing_left)


def test_a_plain_pass_after_an_intervention_equals_the_one_before() -> None:
    weights = {n: p.clone() for n, p in resident(LLAMA).network.named_parameters()}
    before = logits(LLAMA)
    changes = [at(site, Noise(1.0, 3)) for site in writable(LLAMA)]
    assert not torch.equal(logits(LLAMA, *changes), before)
    assert torch.equal(logits(LLAMA), before)
    for name, parameter in resident(LLAMA).network.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize(
    ("intervention", "text"),
    [
        (
            at(Site.LOGITS, Zero()),
            r"\[0\].site: LOGITS can only be read; expected one of EMB",
        ),
        (at(Site.ROUTER, Zero()), "site: layer 0 of .* has no ROUTER; expected one of"),
        (at(Site.ATTENTION_PATTERN, Zero()), "site: block applies to ATTENTION_PATTERN"),
        (at(Site.NEURONS, Zero(), experts=(0,)), "experts: no requested site has experts"),
        (at(Site.QUERY, BlockSources()), "block: block applies to ATTENTION_PATTERN"),
        (at(Site.EMBEDDING, Zero(), layers=(0,)), "layers: EMBEDDING has no layer"),
        (at(Site.QUERY, Zero(), layers=(2,)), "layers: .* has no layer 2; expected -2 to 1"),
        (at(Site.QUERY, Zero(), positions=(9,)), "positions: position 9 is outside the prompt"),
        (at(Site.QUERY, Zero(), positions=(8, -1)), "positions: positions are repeated"),
        (at(Site.KEY, Zero(), heads=(2,)), "heads: KEY has no head 2; expected 0 to 1"),
        (at(Site.QUERY, Zero(), heads=(1, 1)), "heads: heads are repeated"),
        (at(Site.MLP_OUTPUT, Zero(), heads=(0,)), "heads: MLP_OUTPUT has no heads"),
        (at(Site.MLP_OUTPUT, Zero(), neurons=(0,)), "neurons: only NEURONS has neurons"),
        (at(Site.NEURONS, Zero(), neurons=(40,)), "neurons: NEURONS has no neuron 40"),
        (at(Site.QUERY, Zero(), sources=(0,)), "source_positions: only ATTENTION_PATTERN has"),
        (
            at(Site.BLOCK_OUTPUT, SetTo(np.ones(31, np.float32)), positions=(1, 2)),
            r"set.shape: the tensor has shape \[31\]; expected \[32\], or \[2, 32\] for 2 pos",
        ),
        (at(Site.BLOCK_OUTPUT, Add(np.ones((32, 1), np.float32))), "add.vector.shape: the tensor"),
        (
            at(Site.BLOCK_OUTPUT, PatchFrom((1, 2))),
            "patch.input: the other prompt has 2 tokens and this one 9; name the positions",
        ),
        (
            at(Site.BLOCK_OUTPUT, PatchFrom((1, 2)), positions=(1, 3)),
            "patch.input: the other prompt has 2 tokens and no position 3",
        ),
        (
            at(Site.BLOCK_OUTPUT, PatchFrom((1, 2), (0,)), positions=(1, 3)),
            "patch.positions: 1 positions given for 2 positions to change",
        ),
        (at(Site.BLOCK_OUTPUT, MeanOver(())), "mean_over.inputs: no prompts given"),
        (at(Site.BLOCK_OUTPUT, MeanOver(((1,),))), r"mean_over.inputs\[0\]: the mean leaves out"),
        (
            at(Site.ATTENTION_PATTERN, BlockSources(), positions=(2,)),
            "source_positions: position 2 would have no source left in layer 0, head 0",
        ),
    ],
    ids=str,
)
def test_interventions_that_do_not_fit_are_refused(
    intervention: InterventionSpec, text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        logits(LLAMA, intervention)


def test_sources_hidden_by_several_interventions_are_counted_together() -> None:
    first = at(Site.ATTENTION_PATTERN, BlockSources(), positions=(2,), sources=(0, 1), heads=(1,))
    second = at(Site.ATTENTION_PATTERN, BlockSources(), positions=(2, 3), sources=(2,))
    with pytest.raises(InvalidRequest, match=r"interventions\[1\].*position 2 .* head 1"):
        logits(LLAMA, first, second)


def test_adding_nothing_keeps_negative_zeros() -> None:
    negative = at(Site.NEURONS, Scale(-0.0), layers=(0,))
    expected = bits(neurons(LLAMA, negative))
    assert expected.any()
    for operation in (Add(np.zeros(shape_of(LLAMA, Site.NEURONS), np.float32)), Noise(0.0, 1)):
        added = at(Site.NEURONS, operation, layers=(0,))
        assert torch.equal(bits(neurons(LLAMA, negative, added)), expected), operation


def neurons(case: Case, *interventions: InterventionSpec) -> Tensor:
    spec = ActivationsSpec(
        tuple(case.prompt), (Site.NEURONS,), layers=(0,), interventions=interventions
    )
    events = list(activations(resolve_activations(resident(case), spec), never_cancelled))
    return joined([event for event in events if isinstance(event, SiteValues)])


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


WINDOWED = next(case for case in CASES if case.family == "mistral")


def random_blocks(case: Case, seed: int) -> list[InterventionSpec]:
    model, draw = resident(case), np.random.default_rng(seed)
    length = len(case.prompt)

    def some(count: int, share: float) -> tuple[int, ...]:
        return tuple(int(i) for i in np.flatnonzero(draw.random(count) < share))

    return [
        at(
            Site.ATTENTION_PATTERN,
            BlockSources(),
            layers=some(model.view.facts.n_layers, 0.5),
            positions=some(length, 0.25) or (length - 1,),
            heads=some(model.view.attention(0).n_heads, 0.5),
            sources=some(length, 0.3) or (0,),
        )
        for _ in range(3)
    ]


def leaves_no_source(case: Case, blocks: list[InterventionSpec]) -> bool:
    """Whether the blocks together hide all sources of a query position in a head."""
    model = resident(case)
    layers, length = range(model.view.facts.n_layers), len(case.prompt)
    heads = range(model.view.attention(0).n_heads)
    for layer, head, position in product(layers, heads, range(length)):
        first = model.view.attention(layer).scoring.first_source(position)
        left = set(range(first, position + 1))
        for found in blocks:
            if (
                layer in (found.layers or layers)
                and head in (found.heads or heads)
                and position in (found.positions or range(length))
            ):
                left -= set(found.sources)
        if not left:
            return True
    return False


@pytest.mark.parametrize("case", [LLAMA, WINDOWED], ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_refused_exactly_if_a_query_has_no_source_left(case: Case, seed: int) -> None:
    model, blocks = resident(case), random_blocks(case, seed)
    length = len(case.prompt)
    if leaves_no_source(case, blocks):
        with pytest.raises(InvalidRequest, match="no source left"):
            read_interventions(model, blocks, length)
    else:
        assert len(read_interventions(model, blocks, length)) == len(blocks)


@pytest.mark.parametrize("case", [LLAMA, WINDOWED], ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(20))
def test_blocks_of_all_and_of_one_experiment_are_counted_together(case: Case, seed: int) -> None:
    always, own, swept = ([block] for block in random_blocks(case, seed))
    sweep = SweepSpec(swept[0], by_source=True, by_layer=True)
    listed = InterveneSpec(
        tuple(case.prompt), always=tuple(always), experiments=(ExperimentSpec("", tuple(own)),)
    )
    split = InterveneSpec(tuple(case.prompt), always=tuple(always), sweep=sweep)
    alone = leaves_no_source(case, always)
    single = [replace(swept[0], sources=(source,)) for source in swept[0].sources]
    expected = {
        "experiments[0].interventions[0]": leaves_no_source(case, always + own),
        "sweep.template": any(leaves_no_source(case, [*always, one]) for one in single),
    }
    for spec, (field, refused) in zip((listed, split), expected.items(), strict=True):
        if refused:
            where = "always[0]" if alone else field
            with pytest.raises(InvalidRequest, match="no source left") as error:
                resolve_intervene(resident(case), spec)
            assert error.value.violations[0].field == f"{where}.source_positions"
        else:
            assert resolve_intervene(resident(case), spec).experiments

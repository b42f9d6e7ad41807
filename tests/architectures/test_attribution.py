"""Compare attributions with finite differences on plain Hugging Face models that hooks change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from januslens_server.errors import InvalidRequest
from januslens_server.results import EdgeKind
from januslens_server.specs import (
    Criterion,
    InterventionSpec,
    LensKind,
    LensSpec,
    Selection,
    Site,
    TraceSpec,
    Zero,
)
from tests.architectures.cases import Case
from tests.architectures.test_interventions import HOOKED
from tests.architectures.tiny_models import plain, resident
from tests.reference.interventions import Change, HookedModel, Key
from tests.reference.traces import Traced, run_trace

TARGET, OTHER = 7, 11
LAYER = 0
PLACES = (5, 8)  # an earlier position and the last one
# Some models compute norms and softmax in float32, which limits finite differences.
RELATIVE, ABSOLUTE = 2e-3, 5e-4
STEP = 1e-3
EVERYTHING = Selection(heads=0, memory_values_per_head=0, top_neurons=0, bottom_neurons=0)

by_family = {case.family: case for case in reversed(HOOKED)}
every_family = pytest.mark.parametrize("case", by_family.values(), ids=lambda case: case.id)


def traced(case: Case, **options: Any) -> Traced:
    given: dict[str, Any] = {
        "target": (TARGET,),
        "other": (OTHER,),
        "positions": PLACES,
        "selection": EVERYTHING,
        "lens": LensSpec(0, 0),
        "include_projections": False,
        "include_attribution": True,
    }
    return run_trace(resident(case), TraceSpec(tuple(case.prompt), **(given | options)))


class Derivatives:
    """Finite differences of the logit difference at the last position."""

    def __init__(self, case: Case) -> None:
        self.prompt = case.prompt
        self.hooked = HookedModel(plain(case))
        self.hooked.network.double()
        self.values = self.hooked.run(case.prompt)

    def along(self, site: str, change: Callable[[Tensor, float], Tensor], **where: Any) -> float:
        """The derivative at 0 of the result under `change(values, step)` of a site."""

        def at(step: float) -> float:
            def changed(_key: Key, values: Tensor) -> Tensor:
                return change(values, step)

            own = Change(site, changed, layers=(LAYER,), **where)
            last = self.hooked.run(self.prompt, [own])["LOGITS", None][-1]
            return float(last[TARGET] - last[OTHER])

        return (at(STEP) - at(-STEP)) / (2 * STEP)

    def scaled(self, site: str, **where: Any) -> float:
        return self.along(site, lambda values, step: values * (1 + step), **where)


def added(vector: Tensor, values: Tensor, step: float) -> Tensor:
    return values + step * vector


def close(expected: float | list[float]) -> Any:
    return pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)


def attributions(found: Traced) -> dict[tuple[str, str], float]:
    edges = found.edges.values()
    assert all((edge.attribution is None) == (edge.kind is not EdgeKind.PART) for edge in edges)
    return {
        (edge.source, edge.target): edge.attribution
        for edge in edges
        if edge.attribution is not None
    }


@every_family
def test_attribution_is_the_derivative_when_one_part_is_scaled(case: Case) -> None:
    found = attributions(traced(case))
    expected = Derivatives(case)
    values = expected.values
    for position in PLACES:
        at = f"L{LAYER}/p{position}"
        into = {source: attribution for (source, _), attribution in found.items()}
        parallel = (f"{at}/ATTENTION_OUTPUT", f"{at}/RESIDUAL_MID") not in found
        where: dict[str, Any] = {"positions": (position,)}
        for kind, site in (("ATTENTION_OUTPUT", "ATTENTION_OUTPUT"), ("MLP_OUTPUT", "MLP_OUTPUT")):
            wanted = expected.scaled(site, **where)
            assert into[f"{at}/{kind}"] == close(wanted), kind
        wanted = expected.scaled("HEAD_RESULT", heads=(1,), **where)
        assert into[f"{at}/HEAD_OUTPUT/h1"] == close(wanted)
        residual = values["EMBEDDING", None][position]
        middle = "BLOCK_OUTPUT" if parallel else "RESIDUAL_MID"
        wanted = expected.along(middle, partial(added, residual), **where)
        whole = found[f"p{position}/BLOCK_INPUT", f"{at}/{middle}"]
        assert whole == close(wanted)
        name = next(name for name in into if name.startswith(f"{at}/MLP_VALUE/"))
        numbers = [int(part[1:]) for part in name.split("/")[3:]]
        units: dict[str, Any] = {"heads": numbers[:1]} | (
            {"sources": numbers[1:]} if numbers[1:] else {}
        )
        wanted = expected.scaled("NEURONS", **(units | where))
        assert into[name] == close(wanted), name


CASE = {case.family: case for case in HOOKED}
SOME = ("gpt2-plain", "gemma2-multi-head, biased", "gpt_neox-parallel", "mixtral-window")
some_families = pytest.mark.parametrize(
    "case", [case for case in HOOKED if case.id in SOME], ids=lambda case: case.id
)


def sums(found: Traced) -> dict[str, float]:
    """The attributions into each sum, added up."""
    totals: dict[str, float] = {}
    for (_, target), attribution in attributions(found).items():
        totals[target] = totals.get(target, 0.0) + attribution
    return totals


@some_families
def test_attributions_of_a_sum_do_not_depend_on_the_selection(case: Case) -> None:
    everything = sums(traced(case))
    few = sums(traced(case, selection=Selection(1, 1, 2, 1)))
    for target, total in few.items():
        assert total == pytest.approx(everything[target], rel=1e-4, abs=1e-5), target


@some_families
def test_gradients_of_the_residual_stream_are_those_of_autograd(case: Case) -> None:
    found = traced(
        case,
        include_projections=True,
        include_gradients=True,
        lens=LensSpec(top_k=3, bottom_k=0, kind=LensKind.RAW),
    )
    hooked = HookedModel(plain(case))
    outputs: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(keep) for block in hooked.blocks]
    last = hooked.network(torch.tensor([case.prompt]), use_cache=False).logits[0, -1]
    expected = torch.autograd.grad(last[TARGET] - last[OTHER], outputs)
    for handle in handles:
        handle.remove()
    unembedding = hooked.network.get_output_embeddings().weight.detach()
    for layer, gradients in enumerate(expected):
        graph = next(g for g in found.graphs if g.layer == layer)
        assert graph.gradients is not None
        for position in PLACES:
            gradient = gradients.reshape(len(case.prompt), -1)[position]
            (i,) = (i for i, node in enumerate(graph.nodes) if node.id == output(layer, position))
            assert graph.gradients.norms[i] == pytest.approx(float(gradient.norm()), rel=1e-4)
            row = graph.gradients.rows[i]
            if not bool(gradient.any()):  # nothing reads the earlier position of the last layer
                assert row == -1
                continue
            best = (unembedding @ gradient).argsort(descending=True)[:3]
            assert graph.gradients.projections.top_ids[row].tolist() == best.tolist()


def output(layer: int, position: int) -> str:
    return f"L{layer}/p{position}/BLOCK_OUTPUT"


def test_attribution_explains_the_logit_of_the_prediction_by_default() -> None:
    case = CASE["gemma2"]  # its soft-cap is part of the logit
    found = traced(case, target=None, other=None, positions=(8,))
    hooked = HookedModel(plain(case))
    best = int(hooked.run(case.prompt)["LOGITS", None][-1].argmax())
    assert found.header.targets[-1].target_token_id == best
    of_difference = traced(case, target=(best,), positions=(8,))
    of_other = traced(case, target=(OTHER,), other=None, positions=(8,))
    expected = sums(of_difference)
    for target, total in sums(found).items():
        difference = total - sums(of_other)[target]
        assert difference == pytest.approx(expected[target], rel=1e-4, abs=1e-5)


def test_states_above_a_replaced_layer_keep_their_gradients() -> None:
    """Zeroing a whole state cuts every path to the input, but not those above it."""
    case = CASE["llama"]
    cut = (InterventionSpec(Site.BLOCK_OUTPUT, Zero(), layers=(0,)),)
    found = traced(case, interventions=cut)
    below, above = (sums(found)[f"L{layer}/p8/BLOCK_OUTPUT"] for layer in (0, 1))
    assert below == pytest.approx(0.0, abs=1e-3)  # the parts and OTHER add up to zero
    hooked = HookedModel(plain(case))
    hooked.network.double()

    def result(factor: float) -> float:
        changes = [
            Change("BLOCK_OUTPUT", lambda _, v: torch.zeros_like(v), layers=(0,)),
            Change("BLOCK_OUTPUT", lambda _, v: v * factor, layers=(1,), positions=(8,)),
        ]
        last = hooked.run(case.prompt, changes)["LOGITS", None][-1]
        return float(last[TARGET] - last[OTHER])

    assert above == pytest.approx((result(1 + STEP) - result(1 - STEP)) / (2 * STEP), abs=1e-4)


@some_families
def test_parts_are_selected_by_their_direct_contribution(case: Case) -> None:
    """Contributions of all neurons and heads, from a plain model's hooks and final norm."""
    by = Selection(2, 1, 4, 3, by=Criterion.CONTRIBUTION)
    found = traced(case, selection=by, include_attribution=False)
    everything = traced(case, include_attribution=False, include_logit_contribution=True)
    assert found.header.selected_by == Criterion.CONTRIBUTION
    hooked = HookedModel(plain(case))
    values = hooked.run(case.prompt)
    last = len(hooked.blocks) - 1
    for position in PLACES:
        for layer in range(last + 1):
            at = f"L{layer}/p{position}"
            scores = {
                edge.source: edge.logit_contribution or 0.0
                for edge in everything.edges.values()
                if edge.source.startswith(f"{at}/MLP_VALUE/")
            }
            if case.family == "gpt2":  # independent of the server's own contributions
                rows = values["NEURONS", layer][position, :, None] * ff2(hooked, layer)
                own = direct_effects(hooked, values["BLOCK_OUTPUT", last][position], rows)
                assert [scores[f"{at}/MLP_VALUE/n{i}"] for i in range(len(own))] == close(own)
            ranked = sorted(scores, key=lambda name: -scores[name])
            picked = [name for name in found.nodes if name.startswith(f"{at}/MLP_VALUE/")]
            assert set(picked) == {*ranked[:4], *ranked[-3:]}
            assert_largest(found, everything, f"{at}/HEAD_OUTPUT/", 2)
            for head in (name for name in found.nodes if name.startswith(f"{at}/HEAD_OUTPUT/")):
                number = head.rsplit("/", 1)[-1]
                assert_largest(found, everything, f"{at}/MEMORY_VALUE/{number}/", 1)


def direct_effects(hooked: HookedModel, residual: Tensor, vectors: Tensor) -> list[float]:
    """The logit difference along vectors `[n, d]`, with the scale of the final LayerNorm fixed."""
    norm = hooked.network.get_submodule(hooked.family.final_norm)
    scale = residual.var(unbiased=False).add(norm.eps).sqrt()
    unembedding = hooked.network.get_output_embeddings().weight.detach()
    centred = vectors - vectors.mean(-1, keepdim=True)
    normed = centred / scale * norm.weight.detach()
    products: list[float] = (normed @ (unembedding[TARGET] - unembedding[OTHER])).tolist()
    return products


def ff2(hooked: HookedModel, layer: int) -> Tensor:
    weight: Tensor = hooked.blocks[layer].mlp.c_proj.weight.detach()
    return weight


def assert_largest(found: Traced, everything: Traced, prefix: str, count: int) -> None:
    scores = {
        edge.source: edge.logit_contribution or 0.0
        for edge in everything.edges.values()
        if edge.source.startswith(prefix) and edge.kind is EdgeKind.PART
    }
    ranked = sorted(scores, key=lambda name: -scores[name])
    assert {name for name in found.nodes if name.startswith(prefix)} == set(ranked[:count])


def test_parts_are_selected_by_attribution() -> None:
    case = CASE["gemma2"]
    everything = attributions(traced(case))
    found = traced(
        case, selection=Selection(1, 1, 3, 0, by=Criterion.ATTRIBUTION), include_attribution=False
    )
    scores = {source: value for (source, _), value in everything.items() if "/MLP_VALUE/" in source}
    for layer in (0, 1):
        at = f"L{layer}/p8/MLP_VALUE/"
        ranked = sorted((name for name in scores if name.startswith(at)), key=lambda n: -scores[n])
        assert {name for name in found.nodes if name.startswith(at)} == set(ranked[:3])
    assert attributions(found)


@some_families
def test_contributions_to_a_logit_difference_add_up(case: Case) -> None:
    found = traced(
        case, include_checks=True, include_logit_contribution=True, include_attribution=False
    )
    for check in found.summary.checks:
        assert check.measured_error < 1e-5, check
    logits = HookedModel(plain(case)).run(case.prompt)["LOGITS", None]
    assert found.header.other == OTHER
    for target in found.header.targets:
        row = logits[target.position]
        assert target.logit_difference == pytest.approx(float(row[TARGET] - row[OTHER]), abs=1e-4)


def test_second_token_must_be_a_single_token() -> None:
    with pytest.raises(InvalidRequest, match="other: 2 tokens given"):
        traced(CASE["llama"], other=(3, 4))

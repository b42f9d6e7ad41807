"""Test the hooks that provide the expected values of activations and interventions.

Their results are compared with the outputs of plain Hugging Face models, with models that have
other weights, and with identities that hold in every transformer.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architectures.cases import CASES, MIXTURES, VOCABULARY, Case
from tests.architectures.oracle import queries_and_keys
from tests.architectures.tiny_models import plain
from tests.reference.interventions import (
    Change,
    HookedModel,
    Values,
    add,
    block,
    scale,
    take_from,
    zero,
)

LAYERS = range(2)
every_family = pytest.mark.parametrize("case", CASES + MIXTURES, ids=lambda case: case.id)


@cache
def hooked(case: Case) -> HookedModel:
    return HookedModel(plain(case))


@cache
def values_of(case: Case) -> Values:
    return hooked(case).run(case.prompt)


def other_prompt(case: Case) -> list[int]:
    return [(token * 7 + 3) % VOCABULARY for token in case.prompt]


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@every_family
def test_sites_equal_the_outputs_of_hugging_face(case: Case) -> None:
    found, eager = values_of(case), case.attention == "eager"
    with torch.no_grad():
        expected: Any = plain(case)(
            torch.tensor([case.prompt]),
            use_cache=False,
            output_hidden_states=True,
            output_attentions=eager,
        )
    assert_near(found["LOGITS", None], expected.logits[0])
    assert_near(found["EMBEDDING", None], expected.hidden_states[0][0])
    assert_near(found["BLOCK_OUTPUT", 0], expected.hidden_states[1][0])
    if eager:
        for layer in LAYERS:
            pattern = expected.attentions[layer][0].transpose(0, 1)
            assert_near(found["ATTENTION_PATTERN", layer], pattern)


@every_family
def test_outputs_of_sublayers_add_up_to_the_residual_stream(case: Case) -> None:
    found = values_of(case)
    state = found["EMBEDDING", None]
    for layer in LAYERS:
        middle = state + found["ATTENTION_OUTPUT", layer]
        assert_near(found.get(("RESIDUAL_MID", layer), middle), middle)
        assert_near(found["BLOCK_OUTPUT", layer], middle + found["MLP_OUTPUT", layer])
        state = found["BLOCK_OUTPUT", layer]


@every_family
def test_head_results_are_weighted_values(case: Case) -> None:
    found = values_of(case)
    for layer in LAYERS:
        pattern, values = found["ATTENTION_PATTERN", layer], found["VALUE", layer]
        shared = values.repeat_interleave(pattern.shape[1] // values.shape[1], dim=1)
        expected = torch.einsum("ths,she->the", pattern, shared)
        assert_near(found["HEAD_RESULT", layer], expected)


@every_family
def test_queries_and_keys_differ_from_those_of_the_dot_product_by_a_rotation(case: Case) -> None:
    """Rotations keep lengths, up to the one factor by which YaRN and LongRoPE scale."""
    found = values_of(case)
    for layer, seen in enumerate(queries_and_keys(case)):
        assert seen.query is not None
        assert seen.key is not None
        for site, turned in (("QUERY", seen.query), ("KEY", seen.key)):
            before = found[site, layer].transpose(0, 1).norm(dim=-1)
            repeated = len(turned) // len(before)  # Falcon repeats the keys of a group
            ratio = turned.norm(dim=-1)[::repeated] / before
            assert_near(ratio, ratio[:1, :1].expand_as(ratio).detach())


@every_family
def test_changes_to_the_present_values_change_nothing(case: Case) -> None:
    found = values_of(case)
    sites = {site for site, _ in found} - {"LOGITS", "ATTENTION_PATTERN"}
    identities = [
        Change(site, operation)
        for site in sites
        for operation in (scale(1.0), add(torch.zeros(1)), take_from(found, Change(site, zero())))
    ]
    after = hooked(case).run(case.prompt, identities)
    assert torch.equal(after["LOGITS", None], found["LOGITS", None])


@every_family
@pytest.mark.parametrize("site", ["EMBEDDING", "RESIDUAL_MID", "BLOCK_OUTPUT"])
def test_whole_states_of_another_prompt_give_its_logits(case: Case, site: str) -> None:
    other = hooked(case).run(other_prompt(case))
    layer = None if site == "EMBEDDING" else 0
    if (site, layer) not in other:
        return  # a parallel block has no state between its sublayers
    patch = Change(site, take_from(other, Change(site, zero())), layers=[0])
    after = hooked(case).run(case.prompt, [patch])
    assert_near(after["LOGITS", None], other["LOGITS", None])


@every_family
def test_maps_of_another_prompt_give_its_heads(case: Case) -> None:
    other = hooked(case).run(other_prompt(case))
    patches = [
        Change(site, take_from(other, Change(site, zero())), layers=[1])
        for site in ("QUERY", "KEY", "VALUE")
    ]
    after = hooked(case).run(case.prompt, patches)
    assert_near(after["HEAD_RESULT", 1], other["HEAD_RESULT", 1])


@every_family
def test_zeroed_parts_equal_zeroed_weights(case: Case) -> None:
    network = copy.deepcopy(plain(case))
    model = HookedModel(network)
    module = network.get_submodule(model.family.blocks)[1]
    heads = values_of(case)["HEAD_RESULT", 1].shape[1:]
    attention = module.get_submodule(model.family.attention)
    _zero_inputs(attention.get_submodule(model.family.output), heads[1], 2 * heads[1])
    changes = [Change("HEAD_RESULT", zero(), layers=[1], heads=[1])]
    if model.family.ff2 is not None:
        _zero_inputs(module.get_submodule(model.family.ff2), 5, 7)
        changes.append(Change("NEURONS", zero(), layers=[1], heads=[5, 6]))
    with torch.no_grad():
        expected = network(torch.tensor([case.prompt]), use_cache=False).logits[0]
    assert_near(hooked(case).run(case.prompt, changes)["LOGITS", None], expected)


def _zero_inputs(module: Any, start: int, end: int) -> None:
    """Zero the weights of some inputs of a linear map."""
    with torch.no_grad():
        if type(module).__name__ == "Conv1D":
            module.weight[start:end] = 0
        else:
            module.weight[:, start:end] = 0


@every_family
def test_blocked_sources_leave_the_others_renormalised(case: Case) -> None:
    before = values_of(case)["ATTENTION_PATTERN", 0]
    hidden = Change("ATTENTION_PATTERN", block(), [0], positions=[8], heads=[2], sources=[6, 7])
    after = hooked(case).run(case.prompt, [hidden])["ATTENTION_PATTERN", 0]
    expected = before.clone()
    expected[8, 2, [6, 7]] = 0
    expected[8, 2] /= 1 - before[8, 2, [6, 7]].sum()
    assert_near(after, expected)

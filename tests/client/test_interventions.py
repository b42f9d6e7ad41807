"""Interventions on the demo; the expected values are those of plain models with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from januslens import Client, Intervention, InvalidRequest
from januslens.interventions import (
    add,
    intervention_messages,
    knock_out_attention,
    mean_over,
    noise,
    patch,
    scale,
    set_value,
    steer,
    zero,
)
from januslens.v1 import sites_pb2
from januslens_server.demo import model_path
from tests.reference import interventions as reference
from tests.reference.interventions import Change, HookedModel

PROMPT = "The capital of Japan is the city of"
OTHER = "The capital of Peru is the city of"
SECOND = "The capital of Chile is the city of"
VECTOR = np.linspace(-2, 2, 128, dtype=np.float32)


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[Client]:
    with Client(server_address) as client:
        yield client


@pytest.fixture(scope="module")
def hooked() -> HookedModel:
    return HookedModel(
        AutoModelForCausalLM.from_pretrained(
            model_path(), dtype=torch.float32, attn_implementation="eager"
        )
    )


def ids(client: Client, prompt: str) -> list[int]:
    return [token.id for token in client.tokenize(prompt)]


def logits(client: Client, *interventions: Intervention) -> NDArray[Any]:
    return client.activations(PROMPT, sites="LOGITS", interventions=interventions).array("LOGITS")


def assert_equal(client: Client, hooked: HookedModel, made: Intervention, *changes: Change) -> None:
    expected = hooked.run(ids(client, PROMPT), changes)["LOGITS", None].numpy()
    np.testing.assert_allclose(logits(client, made), expected, rtol=1e-3, atol=1e-3)


def test_knocked_out_heads_and_neurons_are_named_with_their_layers(
    client: Client, hooked: HookedModel
) -> None:
    zeroed = [
        Change("HEAD_RESULT", reference.zero(), [1], heads=[2, 0]),
        Change("HEAD_RESULT", reference.zero(), [3], heads=[3]),
    ]
    assert_equal(client, hooked, zero(heads=[(1, 2), (3, 3), (1, 0)]), *zeroed)
    neurons = Change("NEURONS", reference.scale(2.0), [2], heads=[7, 300])
    assert_equal(client, hooked, scale(2.0, neurons=[(2, 7), (2, 300)]), neurons)


def test_steering_adds_a_direction_after_a_layer(client: Client, hooked: HookedModel) -> None:
    moved = Change("BLOCK_OUTPUT", reference.add(torch.from_numpy(VECTOR), 4.0), [1], [7])
    assert_equal(client, hooked, steer(1, VECTOR, 4.0, positions=-1), moved)
    assert_equal(
        client,
        hooked,
        add(VECTOR, "BLOCK_OUTPUT", coefficient=4.0, layers=1, positions=[-1]),
        moved,
    )


def test_values_belong_to_positions_and_heads_in_their_order(
    client: Client, hooked: HookedModel
) -> None:
    values = np.random.default_rng(0).normal(size=(2, 2, 32)).astype(np.float32)
    where = {"layers": [2], "positions": [6, 3], "heads": [3, 1]}
    expected = Change("HEAD_RESULT", reference.set_to(torch.from_numpy(values)), **where)
    assert_equal(client, hooked, set_value(values, "HEAD_RESULT", **where), expected)


def test_states_are_patched_from_another_prompt(client: Client, hooked: HookedModel) -> None:
    other = hooked.run(ids(client, OTHER))
    place = Change("BLOCK_OUTPUT", reference.zero(), [0, 1], [3, 4])
    there = Change("BLOCK_OUTPUT", reference.zero(), [0, 1], [4, 5])
    patched = Change("BLOCK_OUTPUT", reference.take_from(other, there), [0, 1], [3, 4])
    made = patch(
        "BLOCK_OUTPUT", source=OTHER, layers=[0, 1], positions=[3, 4], source_positions=[4, 5]
    )
    assert_equal(client, hooked, made, patched)
    same = Change("BLOCK_OUTPUT", reference.take_from(other, place), [0, 1], [3, 4])
    made = patch("BLOCK_OUTPUT", source=OTHER, layers=[0, 1], positions=[3, 4])
    assert_equal(client, hooked, made, same)


def test_values_are_replaced_by_their_mean_over_prompts(
    client: Client, hooked: HookedModel
) -> None:
    passes = [hooked.run(ids(client, prompt)) for prompt in (OTHER, SECOND)]
    mean = {key: (passes[0][key] + passes[1][key]) / 2 for key in passes[0]}
    place = Change("MLP_OUTPUT", reference.zero(), [2])
    expected = Change("MLP_OUTPUT", reference.take_from(mean, place), [2])
    assert_equal(client, hooked, mean_over([OTHER, SECOND], "MLP_OUTPUT", layers=2), expected)


def test_noise_is_a_function_of_its_seed(client: Client, hooked: HookedModel) -> None:
    shape = hooked.run(ids(client, PROMPT))["EMBEDDING", None].shape
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    added = Change("EMBEDDING", reference.add(drawn[[1, 2]], 0.5), positions=[1, 2])
    assert_equal(client, hooked, noise(0.5, seed=7, positions=[1, 2]), added)


def test_hidden_sources_get_no_attention(client: Client, hooked: HookedModel) -> None:
    hidden = Change("ATTENTION_PATTERN", reference.block(), [1, 2], [7], sources=[3, 4])
    made = knock_out_attention(sources=[3, 4], layers=[1, 2], positions=-1)
    assert_equal(client, hooked, made, hidden)


def test_traces_and_gradients_are_those_of_the_changed_pass(
    client: Client, hooked: HookedModel
) -> None:
    changes = [Change("HEAD_RESULT", reference.zero(), [3])]
    expected = hooked.run(ids(client, PROMPT), changes)["LOGITS", None][-1].softmax(-1)
    (tokyo,) = client.tokenize(" Tokyo")
    without_heads = [zero("HEAD_RESULT", layers=3)]
    trace = client.trace(PROMPT, " Tokyo", interventions=without_heads)
    assert trace.target().target_probability == pytest.approx(float(expected[tokyo.id]), rel=1e-3)
    gradient = client.gradient_lens(PROMPT, " Tokyo", interventions=without_heads)
    assert gradient.header.loss == pytest.approx(-float(expected[tokyo.id].log()), rel=1e-3)
    assert client.estimate_trace(PROMPT, interventions=without_heads).admissible
    plain = client.trace(PROMPT, " Tokyo")
    largest = plain.compare(trace).changed_contributions()[0]
    assert largest.contribution_difference != 0


def test_pairs_become_one_message_per_layer() -> None:
    made = intervention_messages([zero(heads=[(9, 6), (2, 1), (9, 0)])])
    assert [(list(message.layers), list(message.heads)) for message in made] == [
        ([9], [6, 0]),
        ([2], [1]),
    ]
    assert {message.site for message in made} == {sites_pb2.SITE_HEAD_RESULT}
    (message,) = intervention_messages([zero(neurons=5, layers=[1, 2])])
    assert (message.site, list(message.layers)) == (sites_pb2.SITE_NEURONS, [1, 2])
    (message,) = intervention_messages([scale(2.0, neurons=[(3, 7)], experts=[5, 1])])
    assert message.site == sites_pb2.SITE_NEURONS
    assert (list(message.layers), list(message.neurons)) == ([3], [7])
    assert list(message.experts) == [5, 1]  # in this order, as the rows of a tensor


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (zero, ValueError, "no site given"),
        (lambda: zero(heads=1, neurons=2), ValueError, "both given"),
        (lambda: zero(heads=[(1, 2), 3]), ValueError, "pairs"),
        (lambda: zero(heads=[(1, 2)], layers=1), ValueError, "pairs"),
        (lambda: zero(heads=[]), ValueError, "heads is empty"),
        (lambda: zero(experts=[]), ValueError, "experts is empty"),
        (lambda: zero(heads=1, experts=2), ValueError, "both given"),
        (lambda: zero("HEADS"), ValueError, "unknown value 'HEADS'"),
        (lambda: zero(heads=[1.5]), TypeError, "not an integer"),  # type: ignore[list-item]
        (lambda: scale(float("nan"), "LOGITS"), ValueError, "finite"),
        (lambda: steer(1, ["a"]), TypeError, "real numbers"),
        (lambda: mean_over([], "KEY"), ValueError, "prompts is empty"),
        (lambda: intervention_messages(["zero"]), TypeError, "januslens.interventions"),  # type: ignore[list-item]
    ],
)
def test_invalid_arguments_are_refused_before_sending(
    make: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()


def test_the_server_names_the_field_of_an_impossible_change(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refused:
        logits(client, zero(heads=[(1, 2)]), steer(1, VECTOR[:5]))
    assert refused.value.field_violations[0].field.startswith("interventions[1].add")
    with pytest.raises(InvalidRequest, match="8"):
        logits(client, patch("BLOCK_OUTPUT", source="Peru", layers=1))

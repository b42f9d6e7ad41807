"""Experiments on the demo; the expected effects are those of plain models with hooks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from januslens import (
    AsyncClient,
    Client,
    Sweep,
    activation_patching,
    attention_knockouts,
    causal_trace,
    experiments,
    head_knockouts,
)
from januslens_server.demo import model_path
from tests.reference.interventions import Change, HookedModel, add, block, take_from, zero

JAPAN = "The capital of Japan is the city of"
PERU = "The capital of Peru is the city of"


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


def test_head_knockouts_are_differences_of_logits(client: Client, hooked: HookedModel) -> None:
    tokyo, paris = (client.tokenize(text)[0].id for text in (" Tokyo", " Paris"))
    sweep = head_knockouts(client, JAPAN, " Tokyo", " Paris")
    assert sweep.logits.shape == (4, 4)
    for layer, head in ((0, 3), (3, 1)):
        change = Change("HEAD_RESULT", zero(), [layer], heads=[head])
        last = hooked.run(ids(client, JAPAN), [change])["LOGITS", None][-1]
        expected = float(last[tokyo] - last[paris])
        assert sweep.logits[layer, head] == pytest.approx(expected, abs=2e-3)
        probability = float(last.softmax(-1)[tokyo])
        assert sweep.probabilities[layer, head] == pytest.approx(probability, abs=1e-4)
    before = hooked.run(ids(client, JAPAN))["LOGITS", None][-1]
    assert sweep.before.logit == pytest.approx(float(before[tokyo] - before[paris]), abs=2e-3)
    np.testing.assert_allclose(sweep.logit_effects, sweep.logits - sweep.before.logit)
    layer, head, effect = sweep.largest(1)[0]
    assert abs(effect) == np.abs(sweep.logit_effects).max()
    assert effect == sweep.logit_effects[layer, head]


def test_causal_trace_restores_states_of_the_corrupted_pass(
    client: Client, hooked: HookedModel
) -> None:
    clean = hooked.run(ids(client, JAPAN))
    drawn = torch.randn(clean["EMBEDDING", None].shape, generator=torch.Generator().manual_seed(1))
    corrupted = Change("EMBEDDING", add(0.5 * drawn[[3]]), positions=[3])
    sweep = causal_trace(client, JAPAN, " Tokyo", "Japan", standard_deviation=0.5, seed=1, window=2)
    (tokyo,) = ids(client, " Tokyo")
    before = hooked.run(ids(client, JAPAN), [corrupted])["LOGITS", None][-1]
    assert sweep.before.probability == pytest.approx(float(before.softmax(-1)[tokyo]), abs=1e-4)
    place = Change("BLOCK_OUTPUT", zero(), [1, 2], [3])
    restored = Change("BLOCK_OUTPUT", take_from(clean, place), [1, 2], [3])
    after = hooked.run(ids(client, JAPAN), [corrupted, restored])["LOGITS", None][-1]
    assert sweep.probabilities[2, 3] == pytest.approx(float(after.softmax(-1)[tokyo]), abs=1e-4)
    assert sweep.labels[3] == "␣Japan"


def test_activation_patching_takes_states_of_the_clean_prompt(
    client: Client, hooked: HookedModel
) -> None:
    sweep = activation_patching(client, JAPAN, PERU, " Tokyo")
    clean = hooked.run(ids(client, JAPAN))
    place = Change("BLOCK_OUTPUT", zero(), [1], [3])
    patched = Change("BLOCK_OUTPUT", take_from(clean, place), [1], [3])
    last = hooked.run(ids(client, PERU), [patched])["LOGITS", None][-1]
    (tokyo,) = ids(client, " Tokyo")
    assert sweep.logits[1, 3] == pytest.approx(float(last[tokyo]), abs=2e-3)
    assert sweep.logit_effects[0, 1] == pytest.approx(0, abs=1e-4)  # the same token in both
    with pytest.raises(ValueError, match="give prompts of the same length"):
        activation_patching(client, JAPAN, PERU + " the", " Tokyo")


def test_attention_knockouts_hide_sources_from_the_last_position(
    client: Client, hooked: HookedModel
) -> None:
    sweep = attention_knockouts(client, JAPAN, " Tokyo", window=3)
    hidden = Change("ATTENTION_PATTERN", block(), [1, 2, 3], [7], sources=[3])
    last = hooked.run(ids(client, JAPAN), [hidden])["LOGITS", None][-1]
    (tokyo,) = ids(client, " Tokyo")
    assert sweep.logits[2, 3] == pytest.approx(float(last[tokyo]), abs=2e-3)


def test_sweeps_are_shown_as_tables(client: Client) -> None:
    sweep = head_knockouts(client, JAPAN, " Tokyo")
    lines = str(sweep).splitlines()
    assert lines[0].startswith("Heads zeroed: change of the logit of ␣Tokyo")
    assert lines[1].split()[:2] == ["layer", "3"]
    assert float(lines[1].split()[2]) == pytest.approx(sweep.logit_effects[3, 0], abs=0.01)
    frame = sweep.to_pandas()
    assert frame.index.names == ["layer", "head"]
    assert frame["logit_effect"].tolist() == sweep.logit_effects.ravel().tolist()
    assert "Heads zeroed" in sweep._repr_html_()


def test_sweeps_of_several_requests_equal_those_of_one(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = activation_patching(client, JAPAN, PERU, " Tokyo", " Paris")
    monkeypatch.setattr(experiments, "_MAX_EXPERIMENTS", 4 * 3 + 1)  # three positions each
    split = activation_patching(client, JAPAN, PERU, " Tokyo", " Paris")
    np.testing.assert_allclose(split.logits, whole.logits, atol=1e-3)
    np.testing.assert_allclose(split.probabilities, whole.probabilities, atol=1e-4)


def test_targets_and_subjects_must_fit_the_prompt(client: Client) -> None:
    with pytest.raises(ValueError, match="expected one token"):
        head_knockouts(client, JAPAN, " Tokyo Paris")
    with pytest.raises(ValueError, match="no subject given"):
        causal_trace(client, JAPAN)
    with pytest.raises(ValueError, match="is not in the prompt"):
        causal_trace(client, JAPAN, " Tokyo", "Peru")


def test_asynchronous_clients_get_the_same_sweeps(client: Client, server_address: str) -> None:
    async def sweeps() -> list[Sweep]:
        async with AsyncClient(server_address) as other:
            return [
                await causal_trace(other, JAPAN, subject="Japan"),
                await activation_patching(other, JAPAN, PERU),
            ]

    expected = [
        causal_trace(client, JAPAN, " Tokyo", "Japan"),
        activation_patching(client, JAPAN, PERU, " Tokyo"),
    ]
    for found, sweep in zip(asyncio.run(sweeps()), expected, strict=True):
        assert (found.target, found.labels, found.before) == (
            sweep.target,
            sweep.labels,
            sweep.before,
        )
        np.testing.assert_array_equal(found.logits, sweep.logits)


def test_other_clients_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a Client or an AsyncClient"):
        head_knockouts("127.0.0.1:50051", JAPAN)  # type: ignore[call-overload]

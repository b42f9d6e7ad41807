"""The figures of docs/experiments.md on a published model, and one of them from plain hooks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from januslens import Client, causal_trace, head_knockouts, launch
from tests.real.checkpoints import SMOLLM
from tests.reference.interventions import Change, HookedModel, zero

pytestmark = pytest.mark.real

EIFFEL = "The Eiffel Tower is located in the city of"
CLEAN = "When Mary and John went to the store, John gave a drink to"
PAGE = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with launch(f"smollm2={SMOLLM}", progress=None) as client:
        yield client


def test_head_knockouts_have_the_documented_effects(client: Client) -> None:
    sweep = head_knockouts(client, CLEAN, " Mary", " John", positions=[-1])
    documented = re.findall(r"\| layer (\d+), head (\d+) \| ([-+]\d+\.\d+) \|", PAGE)
    assert len(documented) == 5
    for (layer, head, effect), found in zip(documented, sweep.largest(5), strict=True):
        assert found[:2] == (int(layer), int(head))
        assert found[2] == pytest.approx(float(effect), abs=0.02)

    ids = [token.id for token in client.tokenize(CLEAN, special_tokens=True)]
    mary, john = (client.tokenize(text)[0].id for text in (" Mary", " John"))
    model = AutoModelForCausalLM.from_pretrained(
        SMOLLM, dtype=torch.float32, attn_implementation="eager"
    )
    layer, head, _ = sweep.largest(1)[0]
    knocked_out = Change("HEAD_RESULT", zero(), [layer], [len(ids) - 1], heads=[head])
    last = HookedModel(model).run(ids, [knocked_out])["LOGITS", None][-1]
    assert sweep.logits[layer, head] == pytest.approx(float(last[mary] - last[john]), abs=1e-2)


def test_causal_traces_have_the_documented_effects(client: Client) -> None:
    sweep = causal_trace(client, EIFFEL, " Paris", "Eiffel Tower")
    (layers,) = re.findall(r"\| restored state \| (.*) \|", PAGE)
    numbers = [int(name.removeprefix("layer ")) for name in layers.split(" | ")]
    for text, label in (
        ('"iffel", inside the subject', "iffel"),
        ('"of", the last position', "␣of"),
    ):
        (row,) = re.findall(rf"\| {text} \| (.*) \|", PAGE)
        found = sweep.logit_effects[
            numbers, len(sweep.labels) - 1 - sweep.labels[::-1].index(label)
        ]
        assert found == pytest.approx([float(cell) for cell in row.split(" | ")], abs=0.02)

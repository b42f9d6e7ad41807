"""Compare every case of every family with plain Hugging Face models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from januslens_server.models.adapters import ADAPTERS
from januslens_server.models.adapters.modules import run_eagerly
from januslens_server.models.views import Mlp
from tests.architectures.cases import CASES, CONTEXT, FAMILIES, MEASURED, Case
from tests.architectures.measures import MEASURES, Measure
from tests.architectures.tiny_models import plain, resident


@pytest.mark.parametrize(
    ("case", "measure"),
    [
        pytest.param(case, measure, id=f"{case.id}-{measure.name}")
        for case in MEASURED
        for measure in MEASURES
    ],
)
def test_guarantee_holds(case: Case, measure: Measure) -> None:
    assert measure.error(case) <= measure.tolerance


def test_every_adapter_has_a_case() -> None:
    assert set(FAMILIES) == set(ADAPTERS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_facts_match_the_weights_shapes(case: Case) -> None:
    model = resident(case)
    facts, block, attention = model.view.facts, model.view.parts(0), model.view.attention(0)
    assert len(model.view.blocks) == facts.n_layers
    assert attention.query.weight.shape == (facts.d_model, facts.n_heads * facts.d_head)
    for linear in (attention.key, attention.value):
        assert linear.weight.shape == (facts.d_model, facts.n_kv_heads * facts.d_head)
    assert attention.n_kv_heads == facts.n_kv_heads
    assert attention.output.weight.shape == (facts.n_heads * facts.d_head, facts.d_model)
    assert isinstance(block.mlp, Mlp)
    assert block.mlp.ff2.weight.shape == (facts.d_mlp, facts.d_model)
    unembedding = model.view.lens.unembedding
    assert (unembedding.vocab, unembedding.d_model) == (facts.vocab_size, facts.d_model)
    assert facts.max_positions == CONTEXT


def test_falcon_with_multi_query_has_one_key_value_head() -> None:
    (case,) = (case for case in CASES if case.id == "falcon-multi-query")
    model = resident(case)
    assert model.network.config.num_kv_heads == 4
    assert model.view.facts.n_kv_heads == 1


def test_eager_attention_replaces_sdpa_that_omits_scoring() -> None:
    case = next(case for case in CASES if case.family == "mistral")
    network: Any = AutoModelForCausalLM.from_config(case.config(), attn_implementation="sdpa")
    network.load_state_dict(plain(case).state_dict())
    ids = torch.tensor([case.prompt])
    run_eagerly(network)
    assert network.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(network.eval()(ids).logits, plain(case)(ids).logits)

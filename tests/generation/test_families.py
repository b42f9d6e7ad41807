"""Generation of every family, against transformers' `generate` and passes without a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from januslens_server.errors import never_cancelled
from januslens_server.models.decoding import Decoder
from januslens_server.models.resident import cost_sizes
from januslens_server.models.runner import forward
from januslens_server.pipelines.cost import demand_of
from januslens_server.pipelines.cost.demand import Demand, pass_flops
from januslens_server.pipelines.generate import generate
from januslens_server.pipelines.resolve import resolve_generate
from januslens_server.results import FinishReason, GeneratedToken, GenerationSummary
from januslens_server.specs import GenerateSpec, LayerReading
from tests.architectures.cases import BEYOND_LENGTHS, CASES, CONTEXT, Case
from tests.architectures.tiny_models import plain, resident

NEW = 8

# While these generate, the sequence becomes longer than a window of 12 tokens, or than the 16 after
# which the positions of LongRoPE and of Ministral's queries are scaled.
CROSSING = tuple(
    replace(case, length=11)
    for case in BEYOND_LENGTHS
    if case.family in {"gemma2", "gpt_neo", "ministral3", "mistral", "phi3"}
)
GENERATING = CASES + CROSSING


def generated(case: Case, spec: GenerateSpec) -> tuple[list[GeneratedToken], GenerationSummary]:
    request = resolve_generate(resident(case), spec)
    _, *tokens, summary = generate(request, never_cancelled)
    assert isinstance(summary, GenerationSummary)
    return [token for token in tokens if isinstance(token, GeneratedToken)], summary


@pytest.mark.parametrize("case", GENERATING, ids=lambda case: case.id)
def test_greedy_ids_equal_those_of_transformers(case: Case) -> None:
    ids = torch.tensor([case.prompt])
    new = min(NEW, CONTEXT - len(case.prompt) + 1)
    network: Any = plain(case)
    expected = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
    )[0, len(case.prompt) :].tolist()
    tokens, summary = generated(case, GenerateSpec(tuple(case.prompt), max_new_tokens=new))
    assert [token.token.id for token in tokens] == expected
    assert summary.finish_reason is FinishReason.MAX_NEW_TOKENS


@pytest.mark.parametrize("case", GENERATING, ids=lambda case: case.id)
def test_steps_with_a_cache_equal_a_pass_without(case: Case) -> None:
    model = resident(case)
    layers = range(model.view.facts.n_layers)
    new = min(NEW, CONTEXT - len(case.prompt) + 1)
    spec = GenerateSpec(tuple(case.prompt), max_new_tokens=new, reading=LayerReading(top_k=2))
    tokens, _ = generated(case, spec)
    ids = [*case.prompt, *(token.token.id for token in tokens)]
    decoder = Decoder(model, layers, never_cancelled)
    fed = [case.prompt, *([i] for i in ids[len(case.prompt) : -1])]
    for step, part in enumerate(fed):
        logits, outputs = decoder.feed(part)
        length = len(case.prompt) + step
        whole = forward(model, ids[:length], layers, never_cancelled, (length - 1,), (length - 1,))
        close(logits, whole.logits[0].float())
        close(outputs[-1], whole.residual[-1])
        token = tokens[step]
        distribution = whole.logits[0].double().log_softmax(-1)
        assert token.log_probability == pytest.approx(float(distribution[token.token.id]), abs=1e-4)
        entropy = -(distribution.exp() * distribution).nansum() / torch.tensor(2.0).log()
        assert token.entropy_bits == pytest.approx(float(entropy), abs=1e-4)
        assert len(token.layers) == len(layers)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest value."""
    largest = expected[expected.isfinite()].abs().max()
    assert float((found - expected)[expected.isfinite()].abs().max()) <= 1e-5 * float(largest)


def test_cost_includes_the_pass_where_the_rotation_changes() -> None:
    model = resident(next(case for case in CROSSING if case.name == "beyond long rotation"))

    def demand(new: int) -> Demand:
        return demand_of(resolve_generate(model, GenerateSpec(tuple(range(11)), new)))

    before, beyond = demand(6), demand(7)  # the last passes reach 16 and 17 tokens
    assert beyond.flops - before.flops > pass_flops(cost_sizes(model), 17)
    assert beyond.memory - beyond.held > before.memory - before.held

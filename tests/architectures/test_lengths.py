"""Compare attention beyond every configured length with plain Hugging Face models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from januslens_server.models.adapters import view_of
from januslens_server.models.lengths import PROMPT_LENGTH, SHORT, lengths_of
from januslens_server.results import Level
from tests.architectures.cases import BEYOND_LENGTHS, SCALED_QUERIES, SIZES, Case
from tests.architectures.measures import attention
from tests.architectures.tiny_models import plain


@pytest.mark.parametrize("case", BEYOND_LENGTHS, ids=lambda case: case.id)
def test_attention_equals_hugging_face_beyond_the_length(case: Case) -> None:
    assert attention(case) <= 1e-5


def test_length_with_unknown_meaning_leaves_only_sublayers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ministral 3, read without knowing how it scales its queries."""
    from januslens_server.models.adapters import automatic

    monkeypatch.setattr(automatic, "_query_scaling", lambda _config: None)
    case = next(c for c in BEYOND_LENGTHS if c.family == "ministral3")
    assert_only_sublayers(case, "rope_parameters.original_max_position_embeddings")


def test_adapter_that_ignores_a_window_leaves_only_sublayers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adapter maps Mistral as Llama, which has no window."""
    from januslens_server.models import adapters

    monkeypatch.setitem(adapters.ADAPTERS, "mistral", adapters.ADAPTERS["llama"])
    case = next(c for c in BEYOND_LENGTHS if c.id == "mistral-beyond window")
    assert_only_sublayers(case, "for prompts longer than sliding_window")


def assert_only_sublayers(case: Case, reason: str) -> None:
    levels = view_of(plain(case)).levels
    assert {found.level for found in levels} == {Level.SUBLAYERS}
    assert all(reason in found.reason for found in levels)


def test_wide_model_is_checked_on_a_narrow_miniature() -> None:
    """The model itself does not run: it has no weights."""
    wide: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
    }
    wide |= {"num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 32000}
    wide |= {"sliding_window": 4096, "max_position_embeddings": 32768, "pad_token_id": None}
    config = AutoConfig.for_model("mistral", **wide)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    from januslens_server.models.adapters import ADAPTERS
    from januslens_server.models.lengths import first_mismatch, miniature

    small = miniature(network, 32, 8, 128, lengths_of(config))
    assert sum(p.numel() for p in small.parameters()) < 2_000_000
    assert small.config.sliding_window < PROMPT_LENGTH
    assert first_mismatch(small, ADAPTERS["mistral"](small)) is None
    assert first_mismatch(small, ADAPTERS["llama"](small)) == 0


def test_short_lengths_differ_from_each_other_and_from_the_prompt() -> None:
    assert max(SHORT.values()) < PROMPT_LENGTH


def test_lengths_are_found_at_any_depth() -> None:
    config = AutoConfig.for_model(
        "mistral",
        **SIZES | {"sliding_window": 9} | SCALED_QUERIES,
    )
    found = {length.name: length.value for length in lengths_of(config)}
    assert found == {
        "sliding_window": 9,
        "rope_parameters.original_max_position_embeddings": 8,
    }


def test_context_shorter_than_the_miniatures_prompt_is_checked() -> None:
    settings = {"window_size": 4, "max_position_embeddings": 16}
    assert view_of(plain(Case("gpt_neo", "short context", settings))).blocks


def test_deep_model_with_wide_heads_is_checked_on_a_narrow_miniature() -> None:
    settings: dict[str, Any] = {"head_dim": 256, "num_hidden_layers": 18, "hidden_size": 640}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512}
    config = AutoConfig.for_model("gemma3_text", **settings)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    from januslens_server.models.adapters import ADAPTERS
    from januslens_server.models.lengths import first_mismatch, miniature

    small = miniature(network, 4, 1, 256, lengths_of(config))
    assert sum(p.numel() for p in small.parameters()) < 5_000_000
    assert first_mismatch(small, ADAPTERS["gemma3_text"](small)) is None

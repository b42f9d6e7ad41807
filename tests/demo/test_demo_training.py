"""The parts of the demo model's training."""

from functools import cache
from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from demo_training.corpus import documents
from demo_training.tokenizer import END_OF_TEXT_ID, build_tokenizer
from demo_training.train import (
    Recipe,
    batches,
    fit,
    new_model,
    packed_rows,
    previous_token_attention,
    previous_token_mask,
)

TINY = Recipe(n_layers=2, d_model=16, n_heads=2, n_positions=24, row_length=16, batch=4, steps=6)


@cache
def tiny_batches() -> list[Tensor]:
    tokenizer = build_tokenizer(TINY.n_positions)
    rows = packed_rows(documents(seed=2), tokenizer, TINY.row_length)
    return list(islice(batches(rows, TINY.batch), TINY.steps))


def trained() -> GPT2LMHeadModel:
    model = new_model(TINY, vocab=1_200)
    fit(model, tiny_batches(), TINY)
    return model


def test_training_twice_gives_the_same_weights() -> None:
    one, two = trained().state_dict(), trained().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_training_changes_every_parameter() -> None:
    before, after = new_model(TINY, vocab=1_200).state_dict(), trained().state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_rows_are_full_and_start_with_a_document() -> None:
    tokenizer = build_tokenizer(TINY.n_positions)
    rows = list(islice(packed_rows(documents(seed=2), tokenizer, 48), 50))
    assert {len(row) for row in rows} == {48}
    assert all(row[0] != END_OF_TEXT_ID for row in rows)
    assert all(END_OF_TEXT_ID in row for row in rows)


def test_the_vocabulary_is_built_the_same_every_time() -> None:
    assert build_tokenizer(24).get_vocab() == build_tokenizer(24).get_vocab()


def test_the_mask_allows_the_current_and_the_previous_token() -> None:
    allowed = previous_token_mask(4, torch.float32)[0, 0] == 0
    expected = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 0)
    expected[0, -1] = False
    assert torch.equal(allowed, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masked_layers_attend_to_one_previous_token_each(implementation: str) -> None:
    model = new_model(TINY, vocab=100)
    model.set_attn_implementation(implementation)
    tokens = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 3] = 50
    with previous_token_attention(model.transformer.h), torch.no_grad():
        differs = model(tokens).logits != model(changed).logits
    # Two layers of one token each: position 3 affects positions 3, 4 and 5 only.
    assert differs.any(dim=-1)[0].tolist() == [False] * 3 + [True] * 3 + [False] * 2


def test_the_mask_is_removed_after_the_context() -> None:
    model = new_model(TINY, vocab=100)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with previous_token_attention(model.transformer.h):
            during = model(tokens).logits
        after = model(tokens).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, during)

"""Bytes of the demo's vocabulary; tests/loading covers other tokenizers."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from januslens_server.demo import model_path
from januslens_server.models.tokenizer import Vocabulary

TEXTS = ["The capital of Japan", "  two  spaces\n", "naïve Zürich", "東京 👩‍👩‍👧", "e\u0301 \u202e"]
SPECIAL = "<|endoftext|>"


@pytest.fixture(scope="module")
def demo() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(demo: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary(demo.backend_tokenizer)


def test_byte_level_vocabulary_has_every_byte_once(
    demo: PreTrainedTokenizerFast, vocabulary: Vocabulary
) -> None:
    raws = [vocabulary.token(i).raw for i in range(len(demo))]
    singles = [raw for raw in raws if len(raw) == 1]
    assert sorted(singles) == [bytes([byte]) for byte in range(256)]
    assert len(set(raws)) == len(raws)


def test_every_token_equals_the_tokenizers_decoding(
    demo: PreTrainedTokenizerFast, vocabulary: Vocabulary
) -> None:
    for token_id in range(len(demo)):
        token = vocabulary.token(token_id)
        decoded = demo.decode([token_id], clean_up_tokenization_spaces=False)
        assert (token.id, token.text) == (token_id, decoded)
        assert token.raw.decode(errors="replace") == token.text
        assert (token.start, token.end) == (None, None)


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_join_to_the_text(vocabulary: Vocabulary, text: str) -> None:
    tokens = vocabulary.encode_continuation(text)
    assert b"".join(token.raw for token in tokens).decode() == text
    assert (tokens[0].start, tokens[-1].end) == (0, len(text))


def test_leading_space_changes_the_token(vocabulary: Vocabulary) -> None:
    with_space, without = (vocabulary.encode_continuation(text) for text in (" Paris", "Paris"))
    assert [token.text for token in with_space] == [" Paris"]
    assert b"".join(token.raw for token in without) == b"Paris"
    assert with_space[0].id not in {token.id for token in without}


def test_id_beyond_the_tokenizer_has_no_bytes(
    demo: PreTrainedTokenizerFast, vocabulary: Vocabulary
) -> None:
    """Output heads may be padded beyond the vocabulary."""
    token = vocabulary.token(len(demo) + 5)
    assert (token.text, token.raw) == ("", b"")


def test_special_token_is_decoded_to_its_name(
    demo: PreTrainedTokenizerFast, vocabulary: Vocabulary
) -> None:
    assert demo.eos_token_id is not None
    assert vocabulary.token(int(demo.eos_token_id)).text == SPECIAL


def test_long_text_is_not_truncated(vocabulary: Vocabulary) -> None:
    """Validation refuses long prompts; the tokenizer must not truncate them."""
    assert len(vocabulary.encode_prompt(" Japan" * 5000)) == 5000

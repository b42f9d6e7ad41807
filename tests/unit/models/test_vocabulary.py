"""Every byte of the demo's vocabulary; other tokenizers are tests of loading."""

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


def test_a_byte_level_vocabulary_gives_every_byte_once(
    demo: PreTrainedTokenizerFast, vocabulary: Vocabulary
) -> None:
    raws = [vocabulary.token(i).raw for i in range(len(demo))]
    singles = [raw for raw in raws if len(raw) == 1]
    assert sorted(singles) == [bytes([byte]) for byte in range(256)]
    assert len(set(raws)) == len(raws)


def test_every_id_is_what_the_tokenizer_decodes(
    demo: PreTrainedTokenizerFast, vocabulary: Vocabulary
) -> None:
    for token_id in range(len(demo)):
        token = vocabulary.token(token_id)
        decoded = demo.decode([token_id], clean_up_tokenization_spaces=False)
        assert (token.id, token.text) == (token_id, decoded)
        assert token.raw.decode(errors="replace") == token.text
        assert (token.start, token.end) == (None, None)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_join_to_the_text(vocabulary: Vocabulary, text: str) -> None:
    tokens = vocabulary.encode_continuation(text)
    assert b"".join(token.raw for token in tokens).decode() == text
    assert (tokens[0].start, tokens[-1].end) == (0, len(text))


def test_a_leading_space_counts(vocabulary: Vocabulary) -> None:
    with_space, without = (vocabulary.encode_continuation(text) for text in (" Paris", "Paris"))
    assert [token.text for token in with_space] == [" Paris"]
    assert b"".join(token.raw for token in without) == b"Paris"
    assert with_space[0].id not in {token.id for token in without}


def test_an_id_beyond_the_tokenizer_is_empty(
    demo: PreTrainedTokenizerFast, vocabulary: Vocabulary
) -> None:
    """Heads are padded to round sizes."""
    token = vocabulary.token(len(demo) + 5)
    assert (token.text, token.raw) == ("", b"")


def test_a_special_token_is_its_name(demo: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    assert demo.eos_token_id is not None
    assert vocabulary.token(int(demo.eos_token_id)).text == SPECIAL


def test_a_text_longer_than_any_context_is_read_whole(vocabulary: Vocabulary) -> None:
    """What is too long is for the request's validation to say, not for the tokenizer to cut."""
    assert len(vocabulary.encode_prompt(" Japan" * 5000)) == 5000

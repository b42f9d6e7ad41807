"""Targets, spans and texts under every kind of tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from januslens_server.errors import InvalidRequest, ModelFailed
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.tokenizer import TooManyTokens, Vocabulary, _refuse_long
from januslens_server.models.tokenizer_files import read_vocabulary
from januslens_server.pipelines.inputs import read_prompt, read_single_target
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import TraceSummary
from januslens_server.specs import TraceSpec
from tests.architectures.cases import CASES
from tests.architectures.tiny_models import resident
from tests.loading.folders import saved
from tests.loading.tokenizers_of import (
    SPACE,
    bare,
    byte_level,
    sentencepiece,
    vocabulary,
    with_template,
    word_piece,
)

WORDS = ["Tokyo", "Japan", "is"]
MARKED = [*WORDS, *(SPACE + word for word in WORDS)]
SPACED = [*(" " + word for word in WORDS), *WORDS]
GPT2 = next(case for case in CASES if case.id == "gpt2-plain")


def spacing_kinds() -> dict[str, Vocabulary]:
    """Return tokenizers that distinguish a word with a space from one without."""
    stripping = sentencepiece("always", MARKED)
    stripping.normalizer = normalizers.Strip()
    splitting = sentencepiece("always", MARKED)
    splitting.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, "always")]
    )
    kinds = {
        "byte-level": byte_level(False, SPACED),
        "byte-level, prefixed": byte_level(True, SPACED),
        "stripping": stripping,
        "splitting": splitting,
    }
    kinds |= {scheme: sentencepiece(scheme, MARKED) for scheme in ("first", "always", "legacy")}
    return {name: vocabulary(tokenizer) for name, tokenizer in kinds.items()}


KINDS = spacing_kinds()


def texts(vocabulary: Vocabulary, text: str, as_prompt: bool) -> list[str]:
    encode = vocabulary.encode_prompt if as_prompt else vocabulary.encode_continuation
    return [token.text for token in encode(text)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["Tokyo", " Tokyo"])
def test_a_target_is_one_token_with_its_own_space(kind: str, target: str) -> None:
    assert texts(KINDS[kind], target, as_prompt=False) == [target]


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_of_a_target_are_unchanged(kind: str) -> None:
    for target in ("  Tokyo", " Tokyo is", "Tokyo Japan"):
        if kind == "splitting" and "  " in target:
            continue  # Metaspace's own split has no piece for two
        assert "".join(texts(KINDS[kind], target, as_prompt=False)) == target


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_gets_leading_special_tokens_and_no_trailing_ones(
    kind: str,
) -> None:
    prompt = texts(KINDS[kind], "Japan is", as_prompt=True)
    assert prompt[0] == "<s>"
    assert "".join(prompt[1:]).strip() == "Japan is"


def test_a_prompt_is_tokenized_as_its_model_was_trained() -> None:
    assert texts(KINDS["legacy"], "Japan is", as_prompt=True) == ["<s>", " Japan", " is"]
    assert texts(KINDS["byte-level, prefixed"], "Japan", as_prompt=True) == ["<s>", " Japan"]
    assert texts(KINDS["byte-level"], "Japan", as_prompt=True) == ["<s>", "Japan"]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_spelled_in_a_text_are_kept(kind: str) -> None:
    prompt = KINDS[kind].encode_prompt("Japan</s>")
    assert (prompt[-1].text, prompt[-1].start, prompt[-1].end) == ("</s>", 5, 9)


def test_token_of_an_incomplete_character_keeps_its_byte() -> None:
    for kind in ("first", "byte-level"):
        *_, first, second, third = KINDS[kind].encode_continuation(" \u20ac")
        assert [t.raw for t in (first, second, third)] == [b"\xe2", b"\x82", b"\xac"]
        assert [t.text for t in (first, second, third)] == ["\ufffd"] * 3
        assert {(t.start, t.end) for t in (first, second, third)} == {(1, 2)}


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("\ufb01 Tokyo", [(0, 1), (0, 1), (1, 7)]),  # a ligature becomes two letters
        ("\U0001f5fc Tokyo", [(0, 1)] * 4 + [(1, 7)]),  # one character of four bytes
    ],
)
def test_spans_refer_to_characters_of_the_original_prompt(
    prompt: str, spans: list[tuple[int, int]]
) -> None:
    tokenizer = byte_level(False, SPACED)
    tokenizer.normalizer = normalizers.NFKC()
    tokens = vocabulary(tokenizer).encode_prompt(prompt)[1:]
    assert [(token.start, token.end) for token in tokens] == spans


def test_word_pieces_are_shown_as_running_text() -> None:
    own = vocabulary(word_piece(["tokyo", "##ite", ","]))
    assert texts(own, " Tokyoite,", as_prompt=False) == [" tokyo", "ite", " ,"]
    assert texts(own, "Tokyo", as_prompt=True) == ["<s>", " tokyo"]


def test_end_of_word_marker_is_shown_as_a_space() -> None:
    tokenizer = Tokenizer(models.BPE({"to": 0, "kyo</w>": 1}, []))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    own = vocabulary(tokenizer)
    assert [own.token(i).text for i in (0, 1)] == ["to", "kyo "]


def test_without_a_decoder_pieces_are_shown_unchanged() -> None:
    assert texts(vocabulary(bare(WORDS)), "Tokyo is", as_prompt=True) == ["<s>", "Tokyo", "is"]


def test_text_of_an_added_token_is_its_content() -> None:
    for kind in (byte_level(False, SPACED), sentencepiece("first", MARKED)):
        kind.add_tokens([AddedToken("<think>", normalized=False)])
        kind.add_special_tokens(["<|caf\u00e9|>"])
        own = vocabulary(kind)
        shown = texts(own, "Tokyo<think><|caf\u00e9|>", as_prompt=True)
        assert [text.strip() for text in shown[1:]] == ["Tokyo", "<think>", "<|caf\u00e9|>"]


# Every kind of tokenizer, including those whose model has control tokens as ordinary pieces.
LITERAL_KINDS = {
    **KINDS,
    "word pieces": vocabulary(word_piece(["[INST]", "<s>", "japan"])),
    "words": vocabulary(bare([*WORDS, "<s>", "[INST]"])),
}


@pytest.mark.parametrize("kind", LITERAL_KINDS)
@pytest.mark.parametrize("text", ["</s>", "<s>Japan", "Japan<s></s>", "a <s> <s>", "<0x41>"])
def test_literal_text_never_becomes_a_control_token(kind: str, text: str) -> None:
    own = LITERAL_KINDS[kind]
    control = {own._prompts.token_to_id(name) for name in ("<s>", "</s>", "<0x41>")}
    for tokens in (
        own.encode_continuation(text, literal=True),
        own.encode_prompt(text, literal=True, add_special_tokens=False),
        own.encode_prompt(text, literal=True)[1:],
    ):
        assert not {token.id for token in tokens} & control
        covered = {i for token in tokens for i in range(token.start or 0, token.end or 0)}
        assert covered >= {i for i, char in enumerate(text) if char != " "}


def test_literal_text_splits_undeclared_markup_and_keeps_other_added_words() -> None:
    for kind in (byte_level(False, SPACED), sentencepiece("first", MARKED)):
        kind.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ")])
        own = vocabulary(kind)
        think, spaces = (kind.token_to_id(text) for text in ("<think>", "    "))
        ids = [token.id for token in own.encode_continuation("<think>    ")]
        assert think not in ids
        assert ids[-1] == spaces


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_names_a_control_token_only_as_a_whole(kind: str) -> None:
    own = KINDS[kind]
    (end,) = own.encode_continuation("</s>")
    assert (end.text, end.start, end.end) == ("</s>", 0, 4)
    assert end.id not in {token.id for token in own.encode_continuation("</s>", literal=True)}
    assert end.id not in {token.id for token in own.encode_continuation(" </s>")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_begins_with_bos_gets_no_second_one(kind: str) -> None:
    spelled = KINDS[kind].encode_prompt("<s>Japan")
    assert [token.text for token in spelled].count("<s>") == 1
    assert (spelled[0].text, spelled[0].start, spelled[0].end) == ("<s>", 0, 3)
    added = KINDS[kind].encode_prompt("Japan")
    assert (added[0].text, added[0].start, added[0].end) == ("<s>", 0, 0)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Japan", ["<s>", "[IN]", "Japan"]),
        ("<s>Japan", ["<s>", "Japan"]),
        ("[IN] Japan", ["<s>", "[IN]", "Japan"]),
        ("<s>[IN] Japan", ["<s>", "[IN]", "Japan"]),
        ("Japan <s>", ["<s>", "[IN]", "Japan", "<s>"]),
    ],
)
def test_no_added_token_is_put_before_a_text_that_begins_with_it(text: str, ids: list[str]) -> None:
    tokenizer = bare(WORDS)
    tokenizer.add_special_tokens(["<s>", "[IN]"])
    own = Vocabulary(with_template(tokenizer, ["<s>", "[IN]"], []))
    assert texts(own, text, as_prompt=True) == ids


def test_special_tokens_are_added_for_any_alphabet_of_the_tokenizer() -> None:
    tokenizer = Tokenizer(models.BPE({"\u0434": 0, "\u0430": 1}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    own = Vocabulary(with_template(tokenizer, ["<s>"], ["</s>"]))
    assert texts(own, "\u0434\u0430", as_prompt=True) == ["<s>", "\u0434", "\u0430"]
    assert texts(own, "", as_prompt=True) == ["<s>"]


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.NFKC(), "\uff1cs\uff1e"),
        (normalizers.Lowercase(), "<S>"),
        (normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Lowercase()]), "<S>"),
    ],
)
def test_literal_text_that_normalises_to_a_control_token_is_read_as_characters(
    normalizer: normalizers.Normalizer, text: str
) -> None:
    for tokenizer in (bare(["[INST]"]), sentencepiece("never", ["s"])):
        tokenizer.normalizer = normalizer
        own = vocabulary(tokenizer)
        control = {tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
        tokens = own.encode_prompt(text, literal=True, add_special_tokens=False)
        assert tokens
        assert not {token.id for token in tokens} & control


def test_variants_of_a_tokenizer_keep_ids_and_flags_of_added_tokens() -> None:
    tokenizer = byte_level(False, SPACED)
    size = tokenizer.get_vocab_size()
    added = [
        AddedToken("word", single_word=True, normalized=False),
        AddedToken("left", lstrip=True, normalized=False),
        AddedToken("right", rstrip=True, normalized=True),
        AddedToken("Tok", normalized=False),  # a piece of the model
        AddedToken("last", normalized=False),
    ]
    tokenizer.add_tokens(added)
    own = Vocabulary(tokenizer)
    for text in ("word words", "a  left b", "right  b", "a Tokyo", "last", " left right last"):
        expected = tokenizer.encode(text, add_special_tokens=False)
        for tokens in (own.encode_prompt(text, literal=True), own.encode_continuation(text)):
            assert [token.id for token in tokens] == expected.ids
            assert [(token.start, token.end) for token in tokens] == expected.offsets
    assert [tokenizer.token_to_id(token.content) for token in added][-1] == size + 3


@pytest.mark.parametrize("kind", KINDS)
def test_without_special_tokens_a_prompt_has_only_its_own(kind: str) -> None:
    whole = KINDS[kind].encode_prompt("Japan is")
    assert KINDS[kind].encode_prompt("Japan is", add_special_tokens=False) == whole[1:]
    (bos,) = KINDS[kind].encode_prompt("<s>", add_special_tokens=False)
    assert bos.text == "<s>"


def test_a_long_text_is_refused_after_its_first_part() -> None:
    class Counting:
        """A tokenizer that records the lengths of the texts it was given."""

        def __init__(self, tokenizer: Tokenizer) -> None:
            self.lengths: list[int] = []
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> object:
            return getattr(self._tokenizer, name)

        def encode_batch(self, texts: list[str], **options: bool) -> object:
            self.lengths += map(len, texts)
            return self._tokenizer.encode_batch(texts, **options)

    own = KINDS["byte-level"]
    counting = Counting(own._prompts)
    with pytest.raises(TooManyTokens):
        _refuse_long(counting, "Tokyo " * 200_000, 96)  # type: ignore[arg-type]
    assert max(counting.lengths) <= 16_384
    for encode in (own.encode_prompt, own.encode_continuation):
        with pytest.raises(TooManyTokens):
            encode(" Tokyo" * 100, at_most=99)
        assert len(encode(" Tokyo" * 20_000, at_most=20_001)) >= 20_000


def test_ids_beyond_the_tokenizers_own_are_empty() -> None:
    token = KINDS["first"].token(10**6)
    assert (token.raw, token.text) == (b"", "")


def test_truncation_and_padding_settings_of_training_are_ignored() -> None:
    tokenizer = bare(WORDS)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    own = Vocabulary(tokenizer)
    for as_prompt in (True, False):
        assert texts(own, "Tokyo is Japan", as_prompt) == ["Tokyo", "is", "Japan"]


def test_a_prompt_of_no_tokens_is_refused() -> None:
    tokenizer = Vocabulary(bare(WORDS))
    model = replace(resident(GPT2), vocabulary=tokenizer)
    for text in ("", "  "):
        with pytest.raises(InvalidRequest, match="no tokens given"):
            read_prompt(model, text)


def test_target_of_several_tokens_is_refused_with_a_list_of_them() -> None:
    view = resident(GPT2).view  # of fewer tokens than the tokenizer
    view = replace(view, facts=replace(view.facts, vocab_size=1000))
    model = replace(resident(GPT2), vocabulary=KINDS["first"], view=view)
    assert model.vocabulary.token(read_single_target(model, " Tokyo", "target")).text == " Tokyo"
    with pytest.raises(InvalidRequest, match=r"' Tokyo', .* ' is'"):
        read_single_target(model, " Tokyo is", "target")


def test_token_beyond_the_embedding_is_refused() -> None:
    size = resident(GPT2).view.facts.vocab_size
    tokenizer = bare([*WORDS, *(f"w{i}" for i in range(size))])
    own = Vocabulary(tokenizer)
    model = replace(resident(GPT2), vocabulary=own)
    beyond = f"w{size - 1}"
    with pytest.raises(InvalidRequest, match=f"'{beyond}' .* expected 0 to {size - 1};"):
        read_prompt(model, f"Tokyo is {beyond}")
    with pytest.raises(InvalidRequest, match=beyond):
        read_single_target(model, beyond, "target")
    assert read_prompt(model, "Tokyo is")


def test_models_are_never_passed_segments(tmp_path: Path) -> None:
    source = saved(GPT2, tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare(WORDS),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(source.location)
    model = load(source)
    *_, summary = trace(
        resolve_trace(model, TraceSpec("Tokyo is", include_checks=True)), lambda: None
    )
    assert isinstance(summary, TraceSummary)
    assert all(check.held for check in summary.checks)
    ids = [t.id for t in model.vocabulary.encode_prompt("Tokyo is")]
    *_, same = trace(resolve_trace(model, TraceSpec(tuple(ids), include_checks=True)), lambda: None)
    assert isinstance(same, TraceSummary)
    assert same.checks == summary.checks


# Classes whose normaliser or pre-tokenizer transformers rebuilds, and one that it reads as it is.
CLASSES = (
    "CodeGenTokenizer",
    "CohereTokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "GemmaTokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
)
SAMPLES = ("in 2023", "Cafe\u0301", "DON'T  stop\n\n10:30", " \u6771\u4eac ", "Tokyo</s>x")


def as_stored(pre_tokenizer: str, normalizer: str) -> Tokenizer:
    """Return a byte-level tokenizer with merges of digits and with these steps."""
    tokenizer = byte_level(False, ["2023", "Tokyo", " Tokyo", "10", "Don"])
    level = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = {
        "plain": level,
        "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
        "no regex": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "prefixed": pre_tokenizers.ByteLevel(add_prefix_space=True),
    }[pre_tokenizer]
    if normalizer != "none":
        tokenizer.normalizer = {
            "lowercase": normalizers.Lowercase(),
            "nfd": normalizers.NFD(),
            "collapsed": normalizers.Replace("  ", " "),
        }[normalizer]
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes") / "model"
    saved(GPT2, path)
    return path


@pytest.mark.parametrize("tokenizer_class", CLASSES)
@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer"),
    [
        ("plain", "none"),
        ("plain", "lowercase"),
        ("digits", "none"),
        ("digits", "nfd"),
        ("no regex", "collapsed"),
        ("prefixed", "none"),
    ],
)
def test_ids_are_those_of_tokenizer_json(
    folder: Path, tokenizer_class: str, pre_tokenizer: str, normalizer: str
) -> None:
    stored = as_stored(pre_tokenizer, normalizer)
    stored.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    own = load(ModelSource("model", str(folder))).vocabulary
    for text in SAMPLES:
        found = [token.id for token in own.encode_prompt(text)]
        assert found == stored.encode(text).ids, text


def test_tokens_that_only_the_configuration_lists_are_added(folder: Path) -> None:
    stored = as_stored("plain", "none")
    stored.save(str(folder / "tokenizer.json"))
    size = stored.get_vocab_size()
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(size): {"content": "<think>", "special": True}},
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(described))
    own = load(ModelSource("model", str(folder))).vocabulary
    assert [t.id for t in own.encode_prompt("<think>", add_special_tokens=False)] == [size]
    described["added_tokens_decoder"] = {str(size + 5): {"content": "<think>", "special": True}}
    path.write_text(json.dumps(described))
    with pytest.raises(ModelFailed, match=f"'<think>' has the id {size + 5} in .*, but {size} in"):
        load(ModelSource("model", str(folder)))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("value", ["</s>", {"content": "</s>"}])
def test_control_tokens_that_only_the_configuration_names_are_not_read_in_literal_text(
    folder: Path, file: str, value: object
) -> None:
    stored = sentencepiece("first", MARKED)  # </s> is one of its pieces
    stored.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps({"eos_token": value} if name == file else {}))
    own = read_vocabulary(folder)
    end = stored.token_to_id("</s>")
    assert end in stored.encode("is</s>").ids
    assert end not in {token.id for token in own.encode_prompt("is</s>", literal=True)}
    (folder / "special_tokens_map.json").unlink()


def test_tokens_that_added_tokens_json_lists_are_added(folder: Path) -> None:
    stored = as_stored("plain", "none")
    stored.save(str(folder / "tokenizer.json"))
    size = stored.get_vocab_size()
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    added = folder / "added_tokens.json"
    added.write_text(json.dumps({"<two>": size + 1, "<pad>": size}))
    own = read_vocabulary(folder)
    found = own.encode_prompt("<pad><two>", add_special_tokens=False)
    assert [token.id for token in found] == [size, size + 1]
    added.unlink()


def gpt2_files(folder: Path, **described: object) -> None:
    """Write the files of a GPT-2 tokenizer that was saved before `tokenizer.json` existed."""
    trained = byte_level(False, [*SPACED, "2023", "don", "</s>"])
    for old in (*folder.glob("tokenizer*"), *folder.glob("*tokens*"), *folder.glob("merges*")):
        old.unlink()
    trained.model.save(str(folder))
    if described:
        (folder / "tokenizer_config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {"tokenizer_class": "GPT2TokenizerFast", "pad_token": "<pad>"},
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "bos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": True},
            "eos_token": "</s>",
            "unk_token": "</s>",
        },
    ],
)
def test_a_gpt2_tokenizer_is_read_from_vocabulary_and_merges(
    folder: Path, described: dict[str, object]
) -> None:
    gpt2_files(folder, **described)
    own = read_vocabulary(folder)
    expected = GPT2Tokenizer.from_pretrained(folder)
    for text in (*SAMPLES, "a</s>b", "a </s>", "<|endoftext|>don't", " \U0001f469\u200d\U0001f467"):
        ids = expected(text, add_special_tokens=False)["input_ids"]
        assert [t.id for t in own.encode_prompt(text, add_special_tokens=False)] == ids, text
    begins = own.encode_prompt("Tokyo")[0]
    assert (begins.text == "</s>") == ("add_bos_token" in described)


@pytest.mark.parametrize(
    ("tokenizer_class", "missing"),
    [
        ("GPT2Tokenizer", "merges.txt"),
        ("LlamaTokenizer", None),
        ("GemmaTokenizer", None),
        ("Qwen2Tokenizer", None),
        ("PreTrainedTokenizerFast", None),
    ],
)
def test_files_that_do_not_say_how_texts_are_split_are_refused(
    folder: Path, tokenizer_class: str, missing: str | None
) -> None:
    gpt2_files(folder, tokenizer_class=tokenizer_class)
    if missing:
        (folder / missing).unlink()
    with pytest.raises(ModelFailed, match=r"tokenizer\.json is missing"):
        load(ModelSource("model", str(folder)))

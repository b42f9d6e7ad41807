"""Build the tokenizer that a GGUF file describes, exactly or not at all.

The metadata has the tokens with their types, and the merges (byte-level BPE) or scores
(SentencePiece) of the model. How texts are split before that is only named, in
`tokenizer.ggml.pre`; `SPLITS` has the names whose published tokenizers are known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from januslens_server.errors import ModelFailed
from januslens_server.models.chat import MAX_TEMPLATE, ChatTemplate
from januslens_server.models.gguf_file import ADVICE, GGUFHeader
from januslens_server.models.tokenizer import Vocabulary, reported_failures
from januslens_server.models.tokenizer_files import check_added_texts

SPACE = "▁"

# Maximum sum of the squared lengths of SentencePiece's tokens, each of which is split at every
# character. Gemma 3's 262,144 tokens have 11 million.
MAX_SPLIT = 2**28

# How published tokenizers split texts, as their tokenizer.json says it. Llama 3 and Qwen 2 take
# contractions, words with at most one character before them, and the rest; they differ in the
# number of digits that stay together. Tekken (Mistral) and GPT-4o also split words where upper-case
# letters follow lower-case ones, and GPT-4o keeps contractions with their word.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
# DeepSeek V3 takes numbers first, then Chinese and Japanese text, then the rest.
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _REST,
)


def _words(digits: str, letters: str = r"\p{L}") -> str:
    return (
        rf"{_CONTRACTION}|{_BEFORE}[{letters}]+|\p{{N}}{digits}"
        rf"| ?[^\s{letters}\p{{N}}]+[\r\n]*{_REST}"
    )


def _cased_words(digits: str, end: str = "") -> str:
    return (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{end}|{_BEFORE}{_UPPER}+{_LOWER}*{end}|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
    )


class _Type(IntEnum):
    """Types of tokens in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _bytes_after(*steps: pre_tokenizers.PreTokenizer, split: bool) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    return pre_tokenizers.Sequence([*steps, last]) if steps else last


def _split_by(*patterns: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return _bytes_after(*steps, split=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return _bytes_after(pre_tokenizers.Digits(individual_digits=True), split=True)


# The pre-tokenizers of byte-level BPE by the name in `tokenizer.ggml.pre`.
SPLITS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    **dict.fromkeys(("gpt-2", "olmo"), lambda: _bytes_after(split=True)),
    **dict.fromkeys(("refact", "smollm", "starcoder"), _single_digits),
    **dict.fromkeys(
        ("dbrx", "falcon-h1", "falcon3", "lfm2", "llama-bpe", "llama-v3", "llama3", "smaug-bpe"),
        lambda: _split_by(_words("{1,3}")),
    ),
    **dict.fromkeys(("deepseek-r1-qwen", "qwen2"), lambda: _split_by(_words(""))),
    "qwen35": lambda: _split_by(_words("", letters=r"\p{L}\p{M}")),
    "tekken": lambda: _split_by(_cased_words("")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), lambda: _split_by(*_DEEPSEEK)),
    "gpt-4o": lambda: _split_by(_cased_words("{1,3}", end=f"{_CONTRACTION}?")),
}
# Tokenizers that look a whole word up before they merge its bytes.
WHOLE_WORDS = {
    "falcon-h1",
    "falcon3",
    "gpt-4o",
    "lfm2",
    "llama-bpe",
    "llama-v3",
    "llama3",
    "tekken",
}
# Tokenizers that put texts in Unicode's composed form (NFC).
COMPOSED = {"deepseek-r1-qwen", "olmo", "qwen2", "qwen35"}
# Tokenizers that begin texts with BOS unless the file says otherwise, as in llama.cpp.
# SentencePiece's do it too.
WITH_BOS = {"falcon-h1", "falcon3", "lfm2", "llama-bpe", "llama-v3", "llama3", "tekken"}


def read_gguf_vocabulary(header: GGUFHeader) -> Vocabulary:
    """Build the tokenizer and the chat template from the metadata of a GGUF file.

    Raises:
        ModelFailed: The file has no tokenizer, or one that is not known exactly.
    """
    described = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in header.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens = _listed(described, "tokens", str)
    types = _listed(described, "token_type", int)
    if not tokens or len(tokens) != len(types):
        raise ModelFailed("the file has no tokenizer: expected tokens with their types")
    if len(set(tokens)) != len(tokens):
        raise ModelFailed("the file's tokenizer has a token twice")
    kind = described.get("model")
    builders = {"gemma4": _gemma4, "gpt2": _byte_level, "llama": _sentence_piece}
    if not isinstance(kind, str) or kind not in builders:
        raise ModelFailed(
            f"the file's tokenizer {kind!r:.80} is not read; expected {' or '.join(builders)}; "
            f"{ADVICE}"
        )
    with reported_failures():
        tokenizer = builders[kind](tokens, types, described)
        _add_tokens(tokenizer, tokens, types)
        names = {
            name: _token_at(tokens, described.get(f"{key}_token_id"), key)
            for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"))
        }
        bos = names["bos_token"]
        begins = kind != "gpt2" or described.get("pre") in WITH_BOS
        if _flag(described, "add_bos_token", default=begins) and bos is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
        variables = {name: text for name, text in names.items() if text is not None}
        return Vocabulary(tokenizer, (), _template(header, variables), bos)


def _listed(described: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """Return a list whose items are of one kind; an empty list if there is none."""
    found = described.get(key)
    usable = isinstance(found, list) and all(isinstance(item, kind) for item in found)
    return found if isinstance(found, list) and usable else []


def _flag(described: Mapping[str, Any], key: str, *, default: bool) -> bool:
    found = described.get(key, default)
    if not isinstance(found, bool):
        raise ModelFailed(f"invalid {key} {found!r:.80}; expected true or false")
    return found


def _token_at(tokens: Sequence[str], token_id: object, name: str) -> str | None:
    if token_id is None:
        return None
    if type(token_id) is int and 0 <= token_id < len(tokens):
        return tokens[token_id]
    raise ModelFailed(f"invalid {name}_token_id {token_id!r:.80}; expected 0 to {len(tokens) - 1}")


def _template(header: GGUFHeader, variables: Mapping[str, str]) -> ChatTemplate:
    source = header.metadata.get("tokenizer.chat_template")
    if source is not None and not (isinstance(source, str) and len(source) <= MAX_TEMPLATE):
        raise ModelFailed(f"invalid chat template; expected at most {MAX_TEMPLATE} characters")
    return ChatTemplate(source, variables)


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Mark control tokens as special, and keep control and user-defined tokens whole in texts."""
    added = [
        AddedToken(text, normalized=False, special=kind == _Type.CONTROL)
        for text, kind in zip(tokens, types, strict=True)
        if kind in {_Type.CONTROL, _Type.USER_DEFINED}
    ]
    check_added_texts("the file's tokenizer", [token.content for token in added])
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size() != len(tokens):
        raise ModelFailed("the file's tokenizer adds tokens that are not in its vocabulary")


def _byte_level(
    tokens: Sequence[str], _types: Sequence[int], described: Mapping[str, Any]
) -> Tokenizer:
    """Build a byte-level BPE like GPT-2's."""
    split = described.get("pre")
    if not isinstance(split, str) or split not in SPLITS:
        raise ModelFailed(
            f"the file's tokenizer splits texts as {split!r:.80}, which is not known; expected one "
            f"of {', '.join(sorted(SPLITS))}; {ADVICE}"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(tokens)},
            merges=_merges(described),
            ignore_merges=split in WHOLE_WORDS,
        )
    )
    if split in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that are merged, the first ones first."""
    merges = _listed(described, "merges", str)
    if not merges:
        raise ModelFailed("the file's tokenizer has no merges: expected a list of texts")
    pairs = [merge.partition(" ") for merge in merges]
    if not all(space for _, space, _ in pairs):
        raise ModelFailed("the file's tokenizer has a merge that is not a pair of tokens")
    return [(left, right) for left, _, right in pairs]


def _gemma4(tokens: Sequence[str], types: Sequence[int], described: Mapping[str, Any]) -> Tokenizer:
    """Build Gemma 4's BPE: SentencePiece's tokens, merged in the order of a list."""
    return _of_pieces(tokens, types, described, _merges(described), prefixed=False)


def _sentence_piece(
    tokens: Sequence[str], types: Sequence[int], described: Mapping[str, Any]
) -> Tokenizer:
    """Build SentencePiece's BPE, whose merges follow from the scores of the tokens.

    SentencePiece merges the adjacent pair whose union has the highest score, the leftmost first.
    """
    scores = _listed(described, "scores", float)
    if len(scores) != len(tokens):
        raise ModelFailed("the file's tokenizer has no scores")
    spaces_removed = _flag(described, "remove_extra_whitespaces", default=False)
    if spaces_removed or described.get("precompiled_charsmap"):
        raise ModelFailed(
            f"the file's tokenizer changes texts before it splits them, which is not read; {ADVICE}"
        )
    pieces = {
        text: scores[i]
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in {_Type.NORMAL, _Type.USER_DEFINED}
    }
    if not all(map(math.isfinite, scores)):
        raise ModelFailed("the file's tokenizer has scores that are not finite")
    if sum(len(text) ** 2 for text in pieces) > MAX_SPLIT:
        raise ModelFailed(f"the file's tokenizer has tokens that are too long; {ADVICE}")
    merges: list[tuple[float, tuple[str, str]]] = []
    for text, score in pieces.items():
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [(score, pair) for pair in splits if pair[0] in pieces and pair[1] in pieces]
    merges.sort(key=lambda merge: -merge[0])
    return _of_pieces(tokens, types, described, [pair for _, pair in merges], prefixed=True)


def _of_pieces(
    tokens: Sequence[str],
    types: Sequence[int],
    described: Mapping[str, Any],
    merges: list[tuple[str, str]],
    *,
    prefixed: bool,
) -> Tokenizer:
    """Build a BPE of SentencePiece's tokens; `prefixed` if texts begin with a space by default."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(tokens)},
            merges=merges,
            unk_token=_token_at(tokens, described.get("unknown_token_id"), "unknown"),
            fuse_unk=True,
            byte_fallback=_Type.BYTE in types,
        )
    )
    prefixed = _flag(described, "add_space_prefix", default=prefixed)
    replaced = normalizers.Replace(" ", SPACE)
    prepended = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prepended, replaced])
    stripped = [decoders.Strip(" ", 1, 0)] if prefixed else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *stripped])
    return tokenizer

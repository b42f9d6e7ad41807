"""Read the tokenizer of a model folder exactly as its files describe it, or refuse it."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from januslens_server.errors import ModelFailed
from januslens_server.models.chat import MAX_TEMPLATE, ChatTemplate
from januslens_server.models.tokenizer import Vocabulary, reported_failures
from januslens_server.models.vetting import (
    KIB,
    MAX_VOCABULARY_ENTRIES,
    MIB,
    check_entries,
    read_json,
)

# Tokenizer classes that `vocab.json` and `merges.txt` describe completely (GPT-2's byte-level BPE),
# and families that use them, for folders that name no class.
GPT2_CLASSES = {"GPT2Tokenizer", "GPT2TokenizerFast"}
GPT2_FAMILIES = {"gpt2", "gpt_neo", "gptj", "opt"}
GPT2_SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")

# Steps of a tokenizer before and after its model.
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Added tokens, and characters of their texts. The published maximum is about 7,000 tokens.
MAX_ADDED, MAX_ADDED_TEXT = 50_000, 2 * MIB
# Characters that describe a step, and SentencePiece's table of characters in it. Published steps
# have less than 4 KiB, their tables 320 KiB.
MAX_STEP, MAX_TABLE = 64 * KIB, MIB
# Times that a step may lengthen a text. Published ones keep its length.
MAX_GROWTH = 16
# Bytes into which SentencePiece's table may turn one character; Unicode's longest has 33.
MAX_MAPPED = 64
# Longest word that WordPiece splits; it takes time with the square of a word's length.
MAX_WORD = 200
# Patterns with such a part may match between two characters, and so insert text there.
_MATCHES_NOTHING = re.compile(r"[*?|^$()]|\{0|\{,|\\[bBAzZGKyY]|^$")


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the tokenizer of a model folder as its `tokenizer.json` describes it.

    transformers rebuilds the normaliser and pre-tokenizer of many tokenizer classes from the class
    alone, so the `tokenizers` library reads the file itself. Further tokens that
    `tokenizer_config.json` or `added_tokens.json` list are added. Without the file, only GPT-2's
    tokenizer is read, because the remaining files of others do not describe how texts are split.

    Raises:
        ModelFailed: The tokenizer is not described, or the files contradict each other.
    """
    described = {
        name: read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    }
    config, special_tokens, added = described.values()
    decoded = config.get("added_tokens_decoder", {})
    _check_added("tokenizer_config.json", decoded, dict)
    _check_added("added_tokens.json", added, int)
    named = {token.content: token for token in _named_tokens({**config, **special_tokens})}
    listed = {
        int(token_id): _added_token(token, special=token.get("special", False))
        for token_id, token in decoded.items()
    } or {
        token_id: named.get(text, AddedToken(text, normalized=True))
        for text, token_id in added.items()
    }
    file = folder / "tokenizer.json"
    with reported_failures():
        if file.is_file():
            _check_tokenizer(file)
            tokenizer = Tokenizer.from_file(str(file))
            _add_listed_tokens(tokenizer, listed)
        else:
            defaults = {**GPT2_SPECIAL, **config, **special_tokens}
            tokenizer = _gpt2_tokenizer(folder, defaults, listed)
        special = {**config, **special_tokens}
        if not file.is_file():
            special = {**GPT2_SPECIAL, **special}
        bos: Any = special.get("bos_token")
        text = _added_token(bos, special=True).content if _is_token(bos) else None
        return Vocabulary(tokenizer, named, _chat_template(folder, special), text)


def _check_tokenizer(file: Path) -> None:
    """Refuse a `tokenizer.json` that takes much memory or time to read, or makes texts much longer.

    The file is checked before the `tokenizers` library reads it, because that already applies the
    normalizer to the added tokens.
    """
    check_entries(file, MAX_VOCABULARY_ENTRIES)
    try:
        described = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ModelFailed(f"{file.name} is not a valid JSON file: {error}") from error
    if not isinstance(described, dict):
        raise ModelFailed(f"{file.name} holds a {type(described).__name__}: expected an object")
    added = described.get("added_tokens") or []
    _check_added(file.name, dict(enumerate(added)) if isinstance(added, list) else added, dict)
    model = described.get("model")
    word = model.get("max_input_chars_per_word") if isinstance(model, dict) else None
    if isinstance(word, int) and word > MAX_WORD:
        raise ModelFailed(
            f"{file.name}: max_input_chars_per_word is too large: expected at most {MAX_WORD}, "
            f"got {word}"
        )
    for name in STEPS:
        _check_step(name, described.get(name))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object without repeated keys, which `tokenizers` reads differently from Python."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ModelFailed("tokenizer.json repeats a key in an object")
    return found


def _check_added(name: str, tokens: object, kind: type) -> None:
    """Refuse too many added tokens or too long ones, and values that are not of this `kind`."""
    found = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    if not all(isinstance(token, kind) for token in found) or not all(
        isinstance(token.get("content"), str) for token in found if isinstance(token, dict)
    ):
        raise ModelFailed(f"{name} has an invalid list of added tokens")
    texts = [str(token["content"]) if isinstance(token, dict) else "" for token in found]
    check_added_texts(name, texts)


def check_added_texts(where: str, texts: Sequence[str]) -> None:
    """Refuse too many added tokens, or too long ones; `where` names them in the error."""
    if len(texts) > MAX_ADDED:
        raise ModelFailed(
            f"{where} has too many added tokens: expected at most {MAX_ADDED}, got {len(texts)}"
        )
    size = sum(map(len, texts))
    if size > MAX_ADDED_TEXT:
        raise ModelFailed(
            f"{where}: the texts of added tokens are too long: expected at most {MAX_ADDED_TEXT} "
            f"characters, got {size}"
        )


def _check_step(name: str, step: object) -> None:
    """Refuse a step whose description is too long, or that makes texts much longer."""
    tables = [part["precompiled_charsmap"] for part in _parts(step) if _has_table(part)]
    size = len(json.dumps(step)) - sum(map(len, tables))
    if size > MAX_STEP or max(map(len, tables), default=0) > MAX_TABLE:
        raise ModelFailed(
            f"tokenizer.json: the {name} is too long: expected at most {MAX_STEP} characters, and "
            f"{MAX_TABLE} for a table"
        )
    growth = math.prod(map(_growth, _parts(step)))
    if growth > MAX_GROWTH or max(map(_longest_mapped, tables), default=0) > MAX_MAPPED:
        raise ModelFailed(
            f"tokenizer.json: the {name} makes texts more than {MAX_GROWTH} times longer"
        )


def _parts(step: object) -> Iterator[dict[str, Any]]:
    """Yield the objects in a step's description, at any depth."""
    if isinstance(step, dict):
        yield step
    if isinstance(step, dict | list):
        for part in step.values() if isinstance(step, dict) else step:
            yield from _parts(part)


def _has_table(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("precompiled_charsmap"), str)


def _growth(part: Mapping[str, Any]) -> float:
    """How many times longer an object in a step's description can make a text."""
    growth = 1.0
    pattern, content = part.get("pattern"), part.get("content")
    if isinstance(pattern, dict) and isinstance(content, str):
        text = str(pattern.get("String") or "")
        inserts = not text and _MATCHES_NOTHING.search(str(pattern.get("Regex") or ""))
        growth = (len(content) + bool(inserts)) / max(1, len(text))
    if isinstance(prepended := part.get("prepend"), str):
        growth = float(len(prepended))
    if isinstance(template := part.get("single"), list):
        growth = float(sum("Sequence" in entry for entry in template if isinstance(entry, dict)))
    return max(1.0, growth)


def _longest_mapped(table: str) -> int:
    """The maximum number of bytes to which SentencePiece's character map expands one character.

    The map begins with the size of a trie of characters; after the trie come texts that end with
    NUL.
    """
    try:
        content = base64.b64decode(table)
    except binascii.Error as error:
        raise ModelFailed("tokenizer.json: precompiled_charsmap is not base64") from error
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return max(map(len, texts.split(b"\0")))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate:
    """Read the chat template as transformers finds it, with the special tokens by their names.

    Raises `ModelFailed` if it is too long or not a string.
    """
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.is_file() else config.get("chat_template")
    beside = folder / "chat_template.json"  # of multimodal models
    if source is None and beside.is_file():
        source = read_json(beside).get("chat_template")
    if isinstance(source, list):  # several by name
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    if source is not None and not (isinstance(source, str) and len(source) <= MAX_TEMPLATE):
        raise ModelFailed(f"invalid chat template; expected at most {MAX_TEMPLATE} characters")
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    variables = {
        key: _added_token(token, special=True).content
        for key, token in tokens.items()
        if _is_token(token)
    }
    return ChatTemplate(source, variables)


def _named_tokens(described: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Yield the special tokens of a description: `bos_token` and the like, and further lists."""
    for key, value in described.items():
        tokens: list[Any] = [value] if key.endswith("_token") else []
        if key in {"additional_special_tokens", "extra_special_tokens"}:
            tokens = list(value.values() if isinstance(value, dict) else value or ())
        # Keys such as add_bos_token hold no token.
        yield from (_added_token(token, special=True) for token in tokens if _is_token(token))


def _is_token(described: object) -> bool:
    content = described.get("content") if isinstance(described, dict) else described
    return isinstance(content, str)


def _added_token(described: str | Mapping[str, Any], *, special: bool) -> AddedToken:
    """Build a token from a text or from an object with flags."""
    if isinstance(described, str):
        return AddedToken(described, normalized=False, special=special)
    flags = {flag: described[flag] for flag in _FLAGS if flag in described}
    return AddedToken(described["content"], special=special, **flags)


def _add_listed_tokens(tokenizer: Tokenizer, listed: Mapping[int, AddedToken]) -> None:
    """Add the listed tokens that the tokenizer lacks, in the order of their ids.

    Raises `ModelFailed` if a token has another id than listed.
    """
    listing = [token for _, token in sorted(listed.items())]
    tokenizer.add_tokens([t for t in listing if tokenizer.token_to_id(t.content) is None])
    for token_id, token in listed.items():
        known = tokenizer.token_to_id(token.content)
        if known != token_id:
            raise ModelFailed(
                f"token {token.content!r} has the id {token_id} in tokenizer_config.json, "
                f"but {known} in the tokenizer; make the folder's files agree"
            )


def _gpt2_tokenizer(
    folder: Path, config: Mapping[str, Any], listed: Mapping[int, AddedToken]
) -> Tokenizer:
    """Read GPT-2's byte-level BPE from `vocab.json` and `merges.txt`."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    kind = config.get("tokenizer_class")
    family = read_json(folder / "config.json").get("model_type")
    known = kind in GPT2_CLASSES if kind else family in GPT2_FAMILIES
    if not (known and vocab.is_file() and merges.is_file()):
        raise ModelFailed(
            f"tokenizer.json is missing, and the other tokenizer files of {kind or family} cannot "
            "be read; add the tokenizer.json that the tokenizer's save_pretrained writes"
        )
    check_entries(vocab, MAX_VOCABULARY_ENTRIES)
    check_entries(merges, MAX_VOCABULARY_ENTRIES)
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    prefixed = bool(config.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    tokenizer.decoder = decoders.ByteLevel()
    _add_listed_tokens(tokenizer, listed)
    tokenizer.add_special_tokens(list(_named_tokens(config)))
    if config.get("add_bos_token", False) and _is_token(config["bos_token"]):
        bos = _added_token(config["bos_token"], special=True).content
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer

"""A model's tokenizer: text to token ids and back, with character spans and exact bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer, models

from januslens_server.results import Token

# Vocabulary entries kept in memory: 64 Ki of some 200 bytes.
ENTRIES = 2**16

# A text whose token count is bounded is tokenized in growing prefixes, so that a megabyte is
# refused after its first part: characters of the first prefix for each allowed token, and at least.
PREFIX_CHARACTERS = 8
SHORTEST_PREFIX = 4096
# How often a prefix must exceed the bound before the whole text is refused unread: text behind a
# prefix may merge its last tokens, but not halve their number.
CERTAIN = 2


class TooManyTokens(ValueError):
    """A text has more tokens than the caller allows."""


class _Encoded(NamedTuple):
    """Token ids and the characters `(start, end)` that each covers."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Vocabulary:
    """Encodes texts for one model, and decodes its tokens with a cache shared by all requests."""

    def __init__(self, tokenizer: Tokenizer, control: Iterable[str] = ()) -> None:
        """Wrap a tokenizer.

        `control` names control tokens among its pieces that it does not list as added tokens.
        """
        self._prompts = tokenizer
        self._prompts.no_truncation()  # folders keep what their training used
        self._prompts.no_padding()
        self._pieces = _Pieces(self._prompts)
        self._control = _control_tokens(tokenizer, control)
        self._prefix = _prefix(tokenizer)
        # Every stream names hundreds of tokens, most of them again and again.
        self.token = lru_cache(ENTRIES)(self._decode)

    @cached_property
    def _literal_prompts(self) -> Tokenizer:
        return _literal(self._prompts)

    @cached_property
    def _continuations(self) -> Tokenizer:
        return _literal(_without_added_spaces(self._prompts))

    def encode_prompt(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        literal: bool = False,
        at_most: int | None = None,
    ) -> list[Token]:
        """Tokenize a prompt.

        Args:
            text: The prompt.
            add_special_tokens: Add the tokens that the tokenizer puts before a text, a BOS token
                for example, but none that the text itself begins with. Those that it would put
                behind the text are always left out, since a prompt goes on.
            literal: Read the text's characters as characters, even where they spell a control
                token.
            at_most: The largest number of tokens.

        Raises:
            TooManyTokens: There are more than `at_most`.
        """
        tokenizer = self._literal_prompts if literal else self._prompts
        encoded = self._encode(tokenizer, text, at_most, literal=literal)
        if add_special_tokens:
            first = encoded.ids[0] if encoded.ids and not literal else None
            added = self._prefix[: self._prefix.index(first) if first in self._prefix else None]
            encoded = _Encoded(added + encoded.ids, [(0, 0)] * len(added) + encoded.spans)
        if at_most is not None and len(encoded.ids) > at_most:
            raise TooManyTokens
        return self._tokens(encoded)

    def encode_continuation(
        self, text: str, *, literal: bool = False, at_most: int | None = None
    ) -> list[Token]:
        """Tokenize a text that continues a prompt, a target for example.

        Its spaces are its own: the tokenizer adds none and takes none away. A text that is exactly
        one control token is that token, unless it is `literal`; inside a longer text a control
        token is read as characters. Raises `TooManyTokens` above `at_most`.
        """
        if not literal and (found := [i for i, name in self._control.items() if name == text]):
            return self._tokens(_Encoded(found[:1], [(0, len(text))]))
        return self._tokens(self._encode(self._continuations, text, at_most, literal=True))

    def _encode(
        self, tokenizer: Tokenizer, text: str, at_most: int | None, *, literal: bool
    ) -> _Encoded:
        if at_most is not None:
            _refuse_long(tokenizer, text, at_most)
        encoded = _encoded(tokenizer, text)
        cuts: list[int] = []
        while literal and (new := self._inside_control_tokens(text, encoded)):
            cuts = sorted({*cuts, *new})
            encoded = self._encode_cut(tokenizer, text, cuts)
        if at_most is not None and len(encoded.ids) > at_most:
            raise TooManyTokens
        return encoded

    def _inside_control_tokens(self, text: str, encoded: _Encoded) -> list[int]:
        """Where to cut a literal text so that none of its tokens is a control token.

        Some models of `tokenizers` (Unigram, WordLevel) hold control tokens among their ordinary
        pieces, and so find them in a text that spells them. One character cannot be cut.
        """
        cuts = []
        for token_id, (start, end) in zip(*encoded, strict=True):
            covered = text[start:end].lstrip()
            if len(covered.rstrip()) > 1 and self._spells(covered.rstrip(), token_id):
                cuts.append(end - len(covered) + 1)
        return cuts

    def _spells(self, text: str, token_id: int) -> bool:
        """Whether a text names this control token or byte, perhaps after normalisation."""
        name = self._control.get(token_id)
        if name is None:
            piece = self._prompts.id_to_token(token_id)
            name = piece if piece and BYTE.fullmatch(piece) else None
        if name is None or name == text or self._prompts.normalizer is None:
            return name == text
        normalised: str = self._prompts.normalizer.normalize_str(text)
        return name == normalised.strip(SPACES)

    def _encode_cut(self, tokenizer: Tokenizer, text: str, cuts: list[int]) -> _Encoded:
        """The parts of a text one by one: what follows a cut is a continuation."""
        whole = _Encoded([], [])
        for start, end in pairwise([0, *cuts, len(text)]):
            part = _encoded(self._continuations if start else tokenizer, text[start:end])
            whole.ids.extend(part.ids)
            whole.spans.extend((first + start, last + start) for first, last in part.spans)
        return whole

    def _tokens(self, encoded: _Encoded) -> list[Token]:
        return [
            self._decode(token_id, start, end)
            for token_id, (start, end) in zip(*encoded, strict=True)
        ]

    def _decode(self, token_id: int, start: int | None = None, end: int | None = None) -> Token:
        """One vocabulary entry, with its place in a text if it has one."""
        raw = self._pieces.raw(token_id)
        return Token(token_id, raw.decode("utf-8", errors="replace"), raw, start, end)


def _encoded(tokenizer: Tokenizer, text: str) -> _Encoded:
    """Tokenize without the interpreter's lock, which only a batch releases."""
    encoding: Encoding = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    return _Encoded(list(encoding.ids), list(encoding.offsets))


def _refuse_long(tokenizer: Tokenizer, text: str, at_most: int) -> None:
    """Raise `TooManyTokens` as soon as a part of the text shows it."""
    length = max(SHORTEST_PREFIX, PREFIX_CHARACTERS * at_most)
    while length < len(text):
        encoding = tokenizer.encode_batch([text[:length]], add_special_tokens=False)[0]
        if len(encoding) > CERTAIN * at_most:
            raise TooManyTokens
        length *= 4


# ------------------------------------------------------------------------------------------------
# Variants of a tokenizer. They share its model: to copy a large vocabulary takes seconds.

# Steps that add or take away a text's outer spaces.
_SPACING_STEPS = {"Prepend", "Strip"}
# Before Metaspace, which keeps spaces as marks of pieces, this one would take away all of them.
_SPLITTING_STEPS = {"WhitespaceSplit"}
# Control tokens that a tokenizer does not declare special still look like markup: <think>, [INST].
_MARKUP = re.compile(r"(<.*>|\[.*\]|\{.*\})", re.DOTALL)
# A space and the mark that SentencePiece writes for it.
SPACES = " \u2581"


def _is_control(token: AddedToken) -> bool:
    return token.special or _MARKUP.fullmatch(token.content.strip(SPACES)) is not None


def _control_tokens(tokenizer: Tokenizer, named: Iterable[str]) -> dict[int, str]:
    """Control tokens' texts by id: those listed as added ones, and the pieces that are named."""
    added = tokenizer.get_added_tokens_decoder()
    control = {i: token.content for i, token in added.items() if _is_control(token)}
    pieces = {text: tokenizer.token_to_id(text) for text in named}
    return control | {i: text for text, i in pieces.items() if i is not None}


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before a text."""
    word = Tokenizer(models.WordLevel({"a": 0}, "a"))
    word.post_processor = tokenizer.post_processor
    encoded = word.encode("a")
    return list(encoded.ids[: encoded.special_tokens_mask.index(0)])


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, which reads the texts of control tokens as ordinary text."""
    literal = _with_steps(tokenizer, _steps(tokenizer))
    literal.encode_special_tokens = True
    return literal


def _without_added_spaces(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without steps that change a text's outer spaces.

    Many tokenizers put a space before a text, or strip those that it has, because they were made
    for whole texts. In a continuation " Tokyo" and "Tokyo" must stay different.
    """
    steps = _steps(tokenizer)
    splitter = steps["pre_tokenizer"]
    dropped = _SPLITTING_STEPS if "Metaspace" in json.dumps(splitter) else set()
    return _with_steps(
        tokenizer,
        steps
        | {
            "normalizer": _without(steps["normalizer"], _SPACING_STEPS, "normalizers"),
            "pre_tokenizer": _without(splitter, dropped, "pretokenizers"),
        },
    )


def _steps(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `tokenizer.json` would say of a tokenizer with the same steps and an empty model."""
    empty = Tokenizer(models.BPE())
    for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(empty, step, getattr(tokenizer, step))
    described: dict[str, Any] = json.loads(empty.to_str())
    return described


def _with_steps(tokenizer: Tokenizer, steps: dict[str, Any]) -> Tokenizer:
    """A tokenizer of other steps with the same model and added tokens; control tokens are special.

    Whether a tokenizer gives them ids of its model or new ones, they come out as in the original,
    which got them in the same order.
    """
    changed = Tokenizer.from_str(json.dumps(steps))
    changed.model = tokenizer.model
    added = tokenizer.get_added_tokens_decoder()
    changed.add_tokens(
        [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=_is_control(token),
            )
            for _, token in sorted(added.items())
        ]
    )
    return changed


def _without(step: dict[str, Any] | None, dropped: set[str], parts: str) -> dict[str, Any] | None:
    """A step, or a sequence of steps, as `tokenizer.json` describes it."""
    if step is None or step["type"] in dropped:
        return None
    if step["type"] == "Sequence":
        kept = [_without(part, dropped, parts) for part in step[parts]]
        return step | {parts: [part for part in kept if part is not None]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if "add_prefix_space" in step:
        return step | {"add_prefix_space": False}
    return step


# ------------------------------------------------------------------------------------------------
# The bytes of vocabulary entries.

# One byte of a character that has no token of its own (SentencePiece's byte fallback).
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What stands before a piece when it is decoded alone: decoders treat a text's start differently.
BEFORE = "x"


class _Pieces:
    """Decodes single vocabulary entries to bytes: one may be part of a character and no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder: dict[str, Any] = _steps(tokenizer)["decoder"] or {}
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in json.dumps(decoder)
        self._suffix = decoder.get("suffix", "") if decoder.get("type") == "BPEDecoder" else ""
        self._verbatim = {i for i, t in added.items() if t.special or self._is_byte_level}

    def raw(self, token_id: int) -> bytes:
        """The bytes of one token; empty for ids beyond the tokenizer's own, in a padded head."""
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._verbatim:
            return piece.encode()
        if self._is_byte_level:
            return b"".join(_BYTES.get(char, char.encode()) for char in piece)
        if byte := BYTE.fullmatch(piece):
            return bytes.fromhex(byte.group(1))
        return self._in_text(piece).encode()

    def _in_text(self, piece: str) -> str:
        """The piece as the tokenizer's decoder writes it inside a text, with its space if any."""
        if self._suffix and piece.endswith(self._suffix):  # marks a word's end, which takes a space
            return piece.removesuffix(self._suffix) + " "
        decoder = self._tokenizer.decoder
        text: str = piece if decoder is None else decoder.decode([BEFORE, piece])
        if text.startswith(BEFORE) and decoder is not None:
            return text.removeprefix(BEFORE)
        return piece.replace("\u2581", " ")


def _byte_alphabet() -> dict[str, bytes]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(other)}


_BYTES = _byte_alphabet()

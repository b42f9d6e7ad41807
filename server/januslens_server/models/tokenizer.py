"""A model's tokenizer: text to token ids and back, with character spans and exact bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer, models

from januslens_server.errors import CancelCheck, never_cancelled
from januslens_server.models.chat import ChatTemplate, Content, Rendered
from januslens_server.results import Token
from januslens_server.specs import Chat

# Maximum number of cached vocabulary entries, of about 200 bytes each.
ENTRIES = 2**16

# If the number of tokens is limited, a text is tokenized in growing prefixes, so that a megabyte is
# refused early. The first prefix has this many characters per allowed token, and at least
# SHORTEST_PREFIX.
PREFIX_CHARACTERS = 3
SHORTEST_PREFIX = 4096
# A text is refused if a prefix has this many times the allowed tokens. The rest of the text may
# merge a prefix's last tokens, but not halve their number.
CERTAIN = 2


class TooManyTokens(ValueError):
    """A text has more tokens than the caller allows."""


class TokenizerFailed(ValueError):
    """The `tokenizers` library failed on a text or a file."""


@contextmanager
def reported_failures() -> Iterator[None]:
    """Raise `TokenizerFailed` for errors and panics of the `tokenizers` library.

    The library raises plain `Exception`. It can also panic, for example if a pattern backtracks too
    often. The exception of a panic does not derive from `Exception` and would end the thread.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        raise TokenizerFailed(str(error)) from error


class _Encoded(NamedTuple):
    """Token ids, and the characters `(start, end)` that each token covers."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Vocabulary:
    """Encode texts for one model and decode its tokens, with a cache that all requests share."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        control: Iterable[str] = (),
        chat: ChatTemplate | None = None,
        bos: str | None = None,
    ) -> None:
        """Wrap a tokenizer.

        `control` holds texts of control tokens that are in its vocabulary but not added tokens.
        `bos` is the text of the token that begins a text, if the tokenizer has one.
        """
        self._chat = chat or ChatTemplate(None, {})
        self._prompts = tokenizer
        self._prompts.no_truncation()  # tokenizer.json may contain the settings of training
        self._prompts.no_padding()
        self._pieces = _Pieces(self._prompts)
        self._control = _control_tokens(tokenizer, control)
        self._prefix = _prefix(tokenizer)
        self._bos = None if bos is None else tokenizer.token_to_id(bos)
        # Every stream contains hundreds of tokens, many of them repeatedly.
        self.token = lru_cache(ENTRIES)(self._decode)

    @cached_property
    def _literal_prompts(self) -> Tokenizer:
        return _literal(self._prompts)

    @cached_property
    def _continuations(self) -> Tokenizer:
        return _literal(_without_added_spaces(self._prompts))

    @reported_failures()
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
            add_special_tokens: Prepend the tokenizer's initial special tokens, for example BOS,
                except those that the text begins with. Final special tokens are never added,
                because the model continues the prompt. An empty text becomes BOS, as in
                transformers' `generate`, also if the tokenizer does not prepend it.
            literal: Tokenize control tokens in the text as ordinary characters.
            at_most: Maximum number of tokens.

        Raises:
            TokenizerFailed: The tokenizer failed on the text.
            TooManyTokens: The text has more than `at_most` tokens.
        """
        tokenizer = self._literal_prompts if literal else self._prompts
        encoded = self._encode(tokenizer, text, at_most, literal=literal)
        if add_special_tokens:
            first = encoded.ids[0] if encoded.ids and not literal else None
            added = self._prefix[: self._prefix.index(first) if first in self._prefix else None]
            if not text and not added and self._bos is not None:
                added = [self._bos]
            encoded = _Encoded(added + encoded.ids, [(0, 0)] * len(added) + encoded.spans)
        if at_most is not None and len(encoded.ids) > at_most:
            raise TooManyTokens
        return self._tokens(encoded)

    @reported_failures()
    def encode_chat(
        self,
        chat: Chat,
        *,
        field: str = "chat",
        at_most: int | None = None,
        check_cancelled: CancelCheck = never_cancelled,
    ) -> list[Token]:
        """Tokenize a conversation as the chat template renders it.

        `check_cancelled` is called often while the template runs.

        The ids are those of transformers' `apply_chat_template`, unless a content spells control
        tokens: these are ordinary characters here.

        Raises:
            InvalidRequest: The messages are invalid; `field` is the path of the conversation.
            NoChatTemplate: The chat template is missing or cannot be used.
            TokenizerFailed: The tokenizer failed on the text.
            TooManyTokens: The conversation has more than `at_most` tokens.
        """
        rendered = self._chat.render(chat, self._control.values(), field, check_cancelled)
        if at_most is not None:
            _refuse_long(self._prompts, rendered.text, at_most)
        encoded = self._encode_rendered(rendered, at_most)
        if at_most is not None and len(encoded.ids) > at_most:
            raise TooManyTokens
        return _with_messages(self._tokens(encoded), rendered.contents)

    def _encode_rendered(self, rendered: Rendered, at_most: int | None) -> _Encoded:
        """Encode a rendered conversation, with control tokens only in the template's own text.

        To find these tokens, all contents are replaced by other words. If the contents add no
        control tokens, the text is encoded as it is. Otherwise the texts between the template's
        control tokens are encoded as literal texts.
        """
        text, hidden = rendered.text, _without_contents(rendered)
        whole, shown = _encoded(self._prompts, [text, hidden])
        markup = self._control_spans(hidden, shown)
        if self._control_spans(text, whole) == markup:
            return whole
        joined = _Encoded([], [])
        behind = 0
        for token_id, (start, end) in [*markup, (None, (len(text), len(text)))]:
            if between := text[behind:start]:
                tokenizer = self._continuations if behind else self._literal_prompts
                part = self._encode(tokenizer, between, at_most, literal=True)
                joined.ids.extend(part.ids)
                joined.spans.extend((first + behind, last + behind) for first, last in part.spans)
            if token_id is not None:
                joined.ids.append(token_id)
                joined.spans.append((start, end))
            behind = end
        return joined

    def _control_spans(
        self, text: str, encoded: _Encoded
    ) -> list[tuple[int | None, tuple[int, int]]]:
        """The control tokens and bytes that the text spells, with their characters."""
        return [
            (token_id, span)
            for token_id, span in zip(*encoded, strict=True)
            if self._spells(text[slice(*span)].strip(), token_id)
        ]

    @reported_failures()
    def encode_continuation(
        self, text: str, *, literal: bool = False, at_most: int | None = None
    ) -> list[Token]:
        """Tokenize a text that continues a prompt, for example a target.

        Spaces are kept as they are. Unless `literal`, a text that is exactly one control token is
        encoded as that token. In a longer text, control tokens are encoded as ordinary characters.

        Raises:
            TokenizerFailed: The tokenizer failed on the text.
            TooManyTokens: The text has more than `at_most` tokens.
        """
        if not literal and (found := [i for i, name in self._control.items() if name == text]):
            return self._tokens(_Encoded(found[:1], [(0, len(text))]))
        return self._tokens(self._encode(self._continuations, text, at_most, literal=True))

    def _encode(
        self, tokenizer: Tokenizer, text: str, at_most: int | None, *, literal: bool
    ) -> _Encoded:
        if at_most is not None:
            _refuse_long(tokenizer, text, at_most)
        encoded = _encoded(tokenizer, [text])[0]
        cuts: list[int] = []
        while at_most is None or len(encoded.ids) <= at_most:
            new = self._inside_control_tokens(text, encoded) if literal else []
            if not new:
                return encoded
            cuts = sorted({*cuts, *new})
            encoded = self._encode_cut(tokenizer, text, cuts)
        raise TooManyTokens

    def _inside_control_tokens(self, text: str, encoded: _Encoded) -> list[int]:
        """Find where to cut a literal text so that none of its tokens is a control token.

        Some models of `tokenizers` (Unigram, WordLevel) have control tokens among their ordinary
        pieces and match them in a text. A token of one character cannot be cut.
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
        """Encode the parts of a text separately. Every part after the first is a continuation."""
        first, *others = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        encoded = _encoded(tokenizer, [first]) + _encoded(self._continuations, others)
        whole = _Encoded([], [])
        for start, part in zip([0, *cuts], encoded, strict=True):
            whole.ids.extend(part.ids)
            whole.spans.extend((begin + start, end + start) for begin, end in part.spans)
        return whole

    def _tokens(self, encoded: _Encoded) -> list[Token]:
        return [
            self._decode(token_id, start, end)
            for token_id, (start, end) in zip(*encoded, strict=True)
        ]

    @reported_failures()
    def _decode(self, token_id: int, start: int | None = None, end: int | None = None) -> Token:
        """Decode one vocabulary entry, with its character span in a text, if any."""
        raw = self._pieces.raw(token_id)
        return Token(token_id, raw.decode("utf-8", errors="replace"), raw, start, end)


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[_Encoded]:
    """Tokenize as a batch, because only batches release the interpreter's lock."""
    encodings: list[Encoding] = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [_Encoded(list(encoding.ids), list(encoding.offsets)) for encoding in encodings]


def _without_contents(rendered: Rendered) -> str:
    """The text with an x for every character of a content that is not a space."""
    pieces: list[str] = []
    behind = 0
    for content in rendered.contents:
        pieces.append(rendered.text[behind : content.start])
        pieces.append(_NO_SPACE.sub("x", rendered.text[content.start : content.end]))
        behind = content.end
    return "".join([*pieces, rendered.text[behind:]])


_NO_SPACE = re.compile(r"\S")


def _with_messages(tokens: list[Token], contents: list[Content]) -> list[Token]:
    """Give tokens with a part of a content its message, and characters of that content."""
    following = iter([*contents, None])
    content = next(following)
    found = []
    for token in tokens:
        start, end = token.start or 0, token.end or 0
        while content is not None and content.end <= start:
            content = next(following)
        if content is None or content.start >= end or start == end:
            found.append(token._replace(start=None, end=None))
            continue
        first = last = None
        if content.offset is not None:
            first = max(start - content.start, 0) + content.offset
            last = min(end, content.end) - content.start + content.offset
        found.append(token._replace(start=first, end=last, message=content.message))
    return found


def _refuse_long(tokenizer: Tokenizer, text: str, at_most: int) -> None:
    """Raise `TooManyTokens` if a prefix of the text already has too many tokens."""
    length = max(SHORTEST_PREFIX, PREFIX_CHARACTERS * at_most)
    while length < len(text):
        encoding = tokenizer.encode_batch([text[:length]], add_special_tokens=False)[0]
        if len(encoding) > CERTAIN * at_most:
            raise TooManyTokens
        length *= 4


# ------------------------------------------------------------------------------------------------
# Variants of a tokenizer. They share its model, because copying a large vocabulary takes seconds.

# Steps that add or remove spaces at the ends of a text.
_SPACING_STEPS = {"Prepend", "Strip"}
# Metaspace keeps spaces as marks in pieces; before it, this step would remove all of them.
_SPLITTING_STEPS = {"WhitespaceSplit"}
# Some control tokens are not declared special but look like markup: <think>, [INST].
_MARKUP = re.compile(r"(<.*>|\[.*\]|\{.*\})", re.DOTALL)
# A space, and SentencePiece's mark for it.
SPACES = " \u2581"


def _is_control(token: AddedToken) -> bool:
    return token.special or _MARKUP.fullmatch(token.content.strip(SPACES)) is not None


def _control_tokens(tokenizer: Tokenizer, named: Iterable[str]) -> dict[int, str]:
    """Texts of control tokens by id: those among the added tokens, and the `named` pieces."""
    added = tokenizer.get_added_tokens_decoder()
    control = {i: token.content for i, token in added.items() if _is_control(token)}
    pieces = {text: tokenizer.token_to_id(text) for text in named}
    return control | {i: text for text, i in pieces.items() if i is not None}


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """Ids of the special tokens that a tokenizer puts before a text."""
    word = Tokenizer(models.WordLevel({"a": 0}, "a"))
    word.post_processor = tokenizer.post_processor
    encoded = word.encode("a")
    return list(encoded.ids[: encoded.special_tokens_mask.index(0)])


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """Return a variant that encodes control tokens in a text as ordinary characters."""
    literal = _with_steps(tokenizer, _steps(tokenizer))
    literal.encode_special_tokens = True
    return literal


def _without_added_spaces(tokenizer: Tokenizer) -> Tokenizer:
    """Return a variant without steps that change the spaces at the ends of a text.

    Many tokenizers add a space before a text or strip spaces, because they expect whole texts. As
    continuations, " Tokyo" and "Tokyo" must remain different.
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
    """Return the content of `tokenizer.json` for the same steps with an empty model."""
    empty = Tokenizer(models.BPE())
    for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(empty, step, getattr(tokenizer, step))
    described: dict[str, Any] = json.loads(empty.to_str())
    return described


def _with_steps(tokenizer: Tokenizer, steps: dict[str, Any]) -> Tokenizer:
    """Return a tokenizer with other steps, but the same model and added tokens.

    All control tokens are special in it. Ids of added tokens are the same as in the original,
    because they are added in the same order.
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
    """Remove the `dropped` steps, and added spaces, from a step as in `tokenizer.json`."""
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

# Prepended to a piece that is decoded alone, because decoders treat a text's start differently.
BEFORE = "x"


class _Pieces:
    """Decode single vocabulary entries to bytes. An entry may be an incomplete character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder: dict[str, Any] = _steps(tokenizer)["decoder"] or {}
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in json.dumps(decoder)
        self._suffix = decoder.get("suffix", "") if decoder.get("type") == "BPEDecoder" else ""
        self._verbatim = {i for i, t in added.items() if t.special or self._is_byte_level}

    def raw(self, token_id: int) -> bytes:
        """Bytes of one token; empty for an id that only a padded output head has."""
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
        """Decode a piece as it appears inside a text, including its space, if any."""
        if self._suffix and piece.endswith(self._suffix):  # a word's end is followed by a space
            return piece.removesuffix(self._suffix) + " "
        decoder = self._tokenizer.decoder
        text: str = piece if decoder is None else decoder.decode([BEFORE, piece])
        if text.startswith(BEFORE) and decoder is not None:
            return text.removeprefix(BEFORE)
        return piece.replace("\u2581", " ")


def _byte_alphabet() -> dict[str, bytes]:
    """Alphabet of byte-level BPE: printable Latin-1 as itself, other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(other)}


_BYTES = _byte_alphabet()

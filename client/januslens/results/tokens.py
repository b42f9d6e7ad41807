"""Tokens, how they are displayed, and the table of their texts that a stream fills."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from januslens.results.exports import notebook_html
from januslens.v1 import common_pb2

OPEN_BOX = "␣"
_VISIBLE = {" ": OPEN_BOX, "\n": "⏎", "\r": "␍", "\t": "⇥"}
# Controls, formats (zero-width, bidi), surrogates, private use, unassigned, other separators.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}
_REPLACEMENT = "\ufffd"
_DOTTED_CIRCLE = "◌"


def visible(text: str, raw: bytes = b"") -> str:
    """`text` with everything made visible that a terminal would hide or obey.

    A space becomes an open box, a newline and a tab arrows, other controls, bidi marks and
    zero-width characters `<U+XXXX>`, and bytes that are no text by themselves `<0xE6>`.
    """
    if _REPLACEMENT in text and raw and not _is_text(raw):
        return "".join(f"<0x{byte:02X}>" for byte in raw)
    shown = "".join(_visible_character(character) for character in text)
    return _DOTTED_CIRCLE + shown if shown and unicodedata.combining(shown[0]) else shown


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _visible_character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if unicodedata.category(character) in _UNPRINTABLE:
        return f"<U+{ord(character):04X}>"
    return character


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of the vocabulary, or one token of a text.

    Attributes:
        id: The vocabulary id.
        text: What it decodes to by itself; lossy where its bytes are only part of a character.
        raw: Its bytes.
        start: First character in the text it was read from; None outside a text.
        end: One past its last character there.
    """

    id: int
    text: str
    raw: bytes = b""
    start: int | None = None
    end: int | None = None

    @classmethod
    def from_message(cls, message: common_pb2.Token) -> Token:
        """Read one token."""
        return cls(
            message.id,
            message.text,
            message.raw,
            message.start if message.HasField("start") else None,
            message.end if message.HasField("end") else None,
        )

    def __str__(self) -> str:
        """The text with spaces and controls made visible; `#id` where there is no text."""
        return visible(self.text, self.raw) or f"#{self.id}"


class Tokens(list[Token]):
    """The tokens of a text, by position."""

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


class TokenTable:
    """Texts by token id, as a stream has sent them so far: each text comes only once."""

    def __init__(self, tokens: Iterable[common_pb2.Token] = ()) -> None:
        self._sent = [tokens]
        self._read = 0
        self._tokens: dict[int, Token] = {}

    def add(self, tokens: Iterable[common_pb2.Token]) -> None:
        """Learn the texts that came with a message; they are read when one is looked for."""
        self._sent.append(tokens)

    def __getitem__(self, token_id: int) -> Token:
        """The token; one without text if none has been sent for it."""
        came = len(self._sent)
        for tokens in self._sent[self._read : came]:
            self._tokens.update((t.id, Token(t.id, t.text, t.raw)) for t in tokens)
        self._read = came  # only now: another thread may look for one meanwhile
        found = self._tokens.get(token_id)
        return Token(token_id, "") if found is None else found

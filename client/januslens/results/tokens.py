"""Tokens, their display, and the table of token texts of a stream."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from januslens.results.exports import notebook_html
from januslens.v1 import common_pb2

OPEN_BOX = "␣"
_VISIBLE = {" ": OPEN_BOX, "\n": "⏎", "\r": "␍", "\t": "⇥"}
# Control, format (zero-width, bidi), surrogate, private-use, unassigned and separator characters.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}
_REPLACEMENT = "\ufffd"
_DOTTED_CIRCLE = "◌"


def visible(text: str, raw: bytes = b"") -> str:
    """Replace the characters that a terminal would not show.

    A space becomes an open box, and newlines and tabs become arrows. Other control characters, bidi
    marks and zero-width characters become `<U+XXXX>`. If `raw` is not valid UTF-8, its bytes are
    shown as `<0xE6>`.
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
        text: The token decoded on its own; has U+FFFD if the token is only part of a character.
        raw: The bytes of the token.
        start: Index of its first character in the tokenized text; None for other tokens.
        end: Index after its last character in the tokenized text; None for other tokens.
        message: In a conversation, the index of the message whose content includes the token;
            `start` and `end` then count characters of that content. None for other tokens.
    """

    id: int
    text: str
    raw: bytes = b""
    start: int | None = None
    end: int | None = None
    message: int | None = None

    @classmethod
    def from_message(cls, message: common_pb2.Token) -> Token:
        """Read one token."""
        return cls(
            message.id,
            message.text,
            message.raw,
            message.start if message.HasField("start") else None,
            message.end if message.HasField("end") else None,
            message.message if message.HasField("message") else None,
        )

    def __str__(self) -> str:
        """The text with visible signs for spaces and control characters; `#id` without a text."""
        return visible(self.text, self.raw) or f"#{self.id}"


class Tokens(list[Token]):
    """The tokens of a text, by position."""

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


class TokenTable:
    """Tokens by id, collected from the messages of a stream, which sends each text once."""

    def __init__(self, tokens: Iterable[common_pb2.Token] = ()) -> None:
        self._sent = [tokens]
        self._read = 0
        self._tokens: dict[int, Token] = {}

    def add(self, tokens: Iterable[common_pb2.Token]) -> None:
        """Add the tokens of a message; they are parsed on the next lookup."""
        self._sent.append(tokens)

    def __getitem__(self, token_id: int) -> Token:
        """The token with this id; its text is empty if it has not been received."""
        came = len(self._sent)
        for tokens in self._sent[self._read : came]:
            self._tokens.update((t.id, Token(t.id, t.text, t.raw)) for t in tokens)
        self._read = came  # last, because other threads may look up tokens meanwhile
        found = self._tokens.get(token_id)
        return Token(token_id, "") if found is None else found

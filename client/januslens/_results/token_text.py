"""How a token is shown: the one place that decides it, for tables and pages alike."""

from __future__ import annotations

import re
import unicodedata

OPEN_BOX = "␣"
_VISIBLE = {" ": OPEN_BOX, "\n": "⏎", "\r": "␍", "\t": "⇥"}
# Controls, formats (zero-width, bidi), surrogates, private use, unassigned, other separators.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}
# What XML 1.0 forbids, and the carriage return, which its readers turn into a line feed.
_NOT_XML = re.compile("[^\\t\\n\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
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
        return _codepoint(character)
    return character


def _codepoint(character: str) -> str:
    return f"<U+{ord(character):04X}>"


def xml_text(text: str) -> str:
    """`text` with the characters that XML cannot hold as `<U+XXXX>`."""
    return _NOT_XML.sub(lambda found: _codepoint(found[0]), text)

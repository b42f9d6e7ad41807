"""Test how tokens are displayed in terminals and pages."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from januslens import Token
from januslens.results.tokens import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Tokyo", "␣Tokyo"),
        ("  ", "␣␣"),
        ("a\n\tb\r", "a⏎⇥b␍"),
        ("\x1b[31m", "<U+001B>[31m"),
        ("\u202eevil", "<U+202E>evil"),  # right-to-left override
        ("zero\u200bwidth", "zero<U+200B>width"),
        ("\u00a0", "<U+00A0>"),  # a space that looks like one and is none
        ("\u0301", "◌\u0301"),  # an accent that would land on what stands before it
        ("日本", "日本"),
        ("[bold]", "[bold]"),
    ],
)
def test_invisible_and_control_characters_are_shown(text: str, shown: str) -> None:
    assert visible(text, text.encode()) == shown


def test_incomplete_utf8_bytes_are_shown_in_hexadecimal() -> None:
    assert visible("\ufffd", b"\xe6") == "<0xE6>"
    assert visible("\ufffd\ufffd", b"\xe6\x97") == "<0xE6><0x97>"


def test_genuine_replacement_character_is_kept() -> None:
    assert visible("\ufffd", "\ufffd".encode()) == "\ufffd"


def test_a_token_without_text_shows_its_id() -> None:
    assert str(Token(17, "")) == "#17"


SHARED = Path(__file__).parents[2] / "client/viewer/test/labels.json"


@pytest.mark.parametrize("case", json.loads(SHARED.read_text()))
def test_terminal_and_page_show_the_same_text(case: dict[str, str]) -> None:
    assert visible(case["text"], base64.b64decode(case.get("raw", ""))) == case["shown"]


@given(st.text())
def test_nothing_shown_controls_a_terminal(text: str) -> None:
    shown = visible(text)
    assert shown or not text
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs") for c in shown)

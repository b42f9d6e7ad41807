"""The format of log lines, and the escaping of callers' texts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from januslens_server.logs import configure_logging, escape

NASTY = 'a"b\nINFO forged\r\x1b[2J\u2028\x00é'


@pytest.fixture(autouse=True)
def _root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def logged(form: str, capsys: pytest.CaptureFixture[str], **extra: object) -> str:
    configure_logging("info", form)
    logging.getLogger("januslens_server.some").info("Trace %s", "OK", extra=extra)
    logging.getLogger("januslens_server.some").debug("not this")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_text_line_has_its_fields_after_the_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = {"forward": 0.00312345, "graph": 0.5}
    line = logged(
        "text", capsys, id="x-1", method="Trace", seconds=0.123456, stages=stages, _library=1
    )
    fields = r"id=x-1 seconds=0\.1235 stages=forward:0\.003123,graph:0\.5"
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z"
    assert re.fullmatch(rf"{time} INFO januslens_server\.some: Trace OK {fields}", line)


def test_a_json_line_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(logged("json", capsys, method="Trace", stages={"forward": 0.25}))
    assert found.pop("timestamp").endswith("Z")
    assert found == {
        "message": "Trace OK",
        "level": "info",
        "logger": "januslens_server.some",
        "method": "Trace",
        "stages": {"forward": 0.25},
    }


@pytest.mark.parametrize("form", ["text", "json"])
def test_line_ends_in_values_are_escaped(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = logged(form, capsys, prompt=NASTY)
    assert line.isprintable()
    if form == "json":
        assert json.loads(line)["prompt"] == NASTY


@pytest.mark.parametrize("form", ["text", "json"])
def test_traceback_lines_are_indented(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", form)
    error = ValueError(NASTY)
    logging.getLogger("x").error("met %s", "a bug\n2026-01-01 INFO forged", exc_info=error)
    first, *others = capsys.readouterr().err.splitlines()
    assert "met a bug\\n2026" in first
    assert all(line.startswith("  ") and line.isprintable() for line in others)
    assert (form == "json") == (others == [])


def test_control_characters_become_python_escapes() -> None:
    assert escape("plain é 日本") == "plain é 日本"
    assert escape("a\n\x1b") == "a\\n\\x1b"

"""docs/surveys.md: its examples run, and its tables are those of the schema."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from januslens.surveys.schema import COLUMNS

GUIDE = Path(__file__).parents[2] / "docs" / "surveys.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^### (\w+)\n(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \|", re.MULTILINE)


def test_every_example_runs(
    server_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "guide"}
    examples = EXAMPLE.findall(GUIDE.read_text())
    assert len(examples) == 10
    for example in examples:
        code = compile(example.replace("127.0.0.1:50051", server_address), GUIDE.name, "exec")
        exec(code, names)  # noqa: S102 - our own documentation
    printed = capsys.readouterr().out
    assert "3 results, 0 failures" in printed
    assert re.search(r"Peru +│ +3 │ +0 │", printed), printed  # the answer after the last layer
    assert "(1, 128)" in printed


def test_every_column_is_documented() -> None:
    sections = dict(SECTION.findall(GUIDE.read_text()))
    shared = dict(ROW.findall(sections.pop("Projections")))
    documented = {}
    for table, text in sections.items():
        own = dict(ROW.findall(text))
        own.pop("label_NAME", None)
        documented[table] = own | (shared if "with projections" in text else {})
    assert documented == {
        table: {name: shown(str(kind)) for name, kind in columns.items()}
        for table, columns in COLUMNS.items()
    }


def shown(kind: str) -> str:
    """Name a type as on the page."""
    listed = re.fullmatch(r"list<\w+: (\w+)(?:<.*>)?>", kind)
    return f"list of {listed[1]}" if listed else kind

"""Check that SECURITY.md names existing tests for its promises, and every hostile test."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "SECURITY.md").read_text().partition("## Protections")[2].partition("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if line.startswith("| ") and not line.startswith("| promise")
]


def named(cell: str) -> list[Path]:
    """Return the files of a cell; a name without a folder is in the folder of the last name."""
    found: list[Path] = []
    for name in re.findall(r"`([^`]+\.py|tests/[^`]+/)`", cell):
        path = Path(name)
        found.append(path if path.parent != Path() else found[-1].parent / path)
    return found


def test_every_promise_names_a_test_that_exists() -> None:
    assert len(ROWS) > 15
    for promise, _, tests in ROWS:
        files = named(tests)
        assert files or "`make audit`" in tests, promise
        assert [str(file) for file in files if not (ROOT / file).exists()] == [], promise


def test_every_hostile_test_is_named() -> None:
    existing = {path.relative_to(ROOT) for path in (ROOT / "tests" / "hostile").glob("test_*.py")}
    assert existing
    assert existing <= {file for _, _, tests in ROWS for file in named(tests)}

"""Check that every test named in docs/promises.md exists, and that every soak test is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "promises.md"
ROWS = re.findall(r"^\| (?!promise )([^|-][^|]*) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
NAMED = {name for _, tests in ROWS for name in re.findall(r"`([^`]+)`", tests)}


def functions(path: Path) -> set[str]:
    """Return the names of a module's tests."""
    body = ast.parse(path.read_text()).body
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in body if isinstance(node, kinds)}


def test_every_row_is_parsed() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert len(ROWS) == len([row for row in rows if not row.startswith("| promise |")])
    assert all(re.fullmatch(r"(`[^`]+` ?)+", tests) for _, tests in ROWS)


def test_every_named_test_exists() -> None:
    missing = []
    for name in sorted(NAMED):
        path, _, test = name.partition("::")
        if not (ROOT / path).exists() or test not in functions(ROOT / path):
            missing.append(name)
    assert missing == []
    assert all(name.partition("::")[2].startswith("test_") for name in NAMED)


def test_every_soak_test_is_named() -> None:
    soaked = {
        f"{path.relative_to(ROOT)}::{test}"
        for path in (ROOT / "tests" / "soak").glob("test_*.py")
        for test in functions(path)
        if test.startswith("test_")
    }
    assert soaked
    assert soaked <= NAMED

"""No source can run data as code, where ruff has no rule for it.

The S and TID251 rules in pyproject.toml refuse `pickle` and its relatives, `eval`, `exec`,
`torch.load`, `shell=True` and unsafe YAML. This test adds `compile`, `__import__` and flags.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("server", "client")
    for path in (ROOT / folder).rglob("*.py")
    if "node_modules" not in path.parts
]
CALLS = {"compile", "__import__"}
FLAGS = {"allow_pickle", "shell", "trust_remote_code"}


def violations(tree: ast.AST) -> Iterator[int]:
    """Return lines that call a function of `CALLS`, or pass one of `FLAGS` other than False."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.lineno
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in FLAGS and not is_false:
                yield keyword.value.lineno


def test_no_source_runs_data_as_code() -> None:
    assert SOURCES
    found = {str(path): list(violations(ast.parse(path.read_text()))) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_every_kind_of_violation_is_found() -> None:
    lines = [
        "load(x, trust_remote_code=True)",
        "load(x, allow_pickle=asked)",
        "run(x, shell=flag)",
        "compile(text, name, mode)",
        "__import__(name)",
        "load(x, allow_pickle=False)",
    ]
    assert list(violations(ast.parse("\n".join(lines)))) == [1, 2, 3, 4, 5]

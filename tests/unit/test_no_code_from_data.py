"""Nothing in the product turns data into code: held by reading the product's own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "server").rglob("*.py"), *(ROOT / "client").rglob("*.py")])
SOURCES = [path for path in SOURCES if "node_modules" not in path.parts]

MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
# Whatever they are called on: `torch.load`, `yaml.load`, `eval`.
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "yaml.load",
    "torch.load",
    "os.system",
    "os.popen",
}


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What a source uses that could run data, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                yield node.lineno, ast.unparse(node.func)
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
                if keyword.arg in {"trust_remote_code", "shell", "allow_pickle"} and on:
                    yield node.lineno, str(keyword.arg)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_data(path: Path) -> None:
    assert list(used(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "eval(text)",
        "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=asked)",
        "run(x, shell=True)",
    ],
)
def test_what_would_run_data_is_found(source: str) -> None:
    assert len(list(used(ast.parse(source)))) == 1

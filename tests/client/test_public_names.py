"""Every name in a public signature can be imported from `januslens`."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from typing import TypeVar

import pytest

import januslens

PUBLIC = {name: getattr(januslens, name) for name in januslens.__all__}
DEFINED = [
    name for name, made in PUBLIC.items() if inspect.isclass(made) or inspect.isfunction(made)
]


@cache
def imported_from(module: str) -> dict[str, str]:
    """Return the module from which each imported name of a module comes."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    sources: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            sources |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            sources |= {alias.asname or alias.name: node.module or "" for alias in node.names}
    return sources


def written(made: object) -> Iterator[tuple[str, str]]:
    """Return the annotations in the source, each with the module that contains it."""
    if inspect.isfunction(made):
        yield from ((made.__module__, text) for text in made.__annotations__.values())
        return
    for ancestor in getattr(made, "__mro__", ()):
        if not ancestor.__module__.startswith("januslens"):
            continue
        fields = inspect.get_annotations(ancestor)
        yield from ((ancestor.__module__, text) for name, text in fields.items() if name[0] != "_")
        for name, member in vars(ancestor).items():
            function = inspect.unwrap(
                getattr(member, "fget", None) or getattr(member, "func", member)
            )
            # Records are made from messages by this package, and streams by its clients.
            if name[0] != "_" and not name.startswith("from_") and inspect.isfunction(function):
                yield from written(function)
    if made in (januslens.Client, januslens.AsyncClient):
        yield from written(made.__init__)


def own_names(made: object) -> set[str]:
    """Return the names of this package in the signatures of a class or function."""
    found = set()
    for module, text in written(made):
        for node in ast.walk(ast.parse(getattr(text, "__forward_arg__", text))):
            if not isinstance(node, ast.Name) or hasattr(builtins, node.id):
                continue
            source = imported_from(module).get(node.id, module)
            variable = isinstance(getattr(sys.modules[module], node.id, None), TypeVar)
            if source.startswith("januslens") and source != "januslens.v1" and not variable:
                found.add(node.id)
    return found


@pytest.mark.parametrize("name", DEFINED)
def test_names_in_public_signatures_are_exported(name: str) -> None:
    assert own_names(PUBLIC[name]) <= set(januslens.__all__)


def test_signatures_are_searched() -> None:
    assert {"Prompt", "Layers", "TraceEvent", "Trace", "ResponseHook"} <= own_names(
        januslens.Client
    )
    assert {"Token", "LayerGraph"} <= own_names(januslens.Trace)


@pytest.mark.parametrize("name", DEFINED)
def test_public_classes_and_functions_are_defined_in_public_modules(name: str) -> None:
    module = PUBLIC[name].__module__
    assert not any(part.startswith("_") for part in module.split(".")), module

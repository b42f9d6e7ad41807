"""Run-time dependencies from the package's metadata; run as a program, it prints the list."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
SHIPPED = ("server", "cli", "analysis")


def required() -> list[Requirement]:
    """Return the requirements of the client and of every extra that users install."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in SHIPPED for line in extras[name])]
    return [Requirement(line) for line in lines]


def installed() -> set[str]:
    """Return the names of all packages that these requirements need here, directly or not."""
    names: set[str] = set()
    waiting = [requirement.name for requirement in required()]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in names:
            names.add(name)
            waiting += _needs(name)
    return names


def _needs(name: str) -> Iterator[str]:
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


if __name__ == "__main__":
    print("\n".join(sorted({str(requirement).replace(" ", "") for requirement in required()})))  # noqa: T201 - its purpose

"""Write the page of measured guarantees.

Use `python -m tests.architectures.figures > docs/guarantees.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.architectures.cases import CASES, MEASURED, MIXTURES, READ_BY_STRUCTURE, Case
from tests.architectures.census import BEGIN, END, recorded, table
from tests.architectures.measures import MEASURES

TEMPLATE = Path(__file__).with_name("guarantees.md")


class Figure(NamedTuple):
    """One measured error."""

    family: str
    config: str
    guarantee: str
    error: float


def figures(cases: Iterable[Case] = MEASURED) -> list[Figure]:
    """Measure every guarantee for every case."""
    return [
        Figure(case.family, case.name, measure.name, measure.error(case))
        for case in cases
        for measure in MEASURES
    ]


def page(measured: Sequence[Figure]) -> str:
    """Return the page in Markdown, with the worst figure of each family's cases."""
    measures = [f"| {m.name} | {m.meaning} | {_shown(m.tolerance)} |" for m in MEASURES]
    return TEMPLATE.read_text().format(
        measures="\n".join(measures),
        adapters=_table(CASES + MIXTURES, measured),
        automatic=_table(READ_BY_STRUCTURE, measured),
        variants=_variants(),
        census=f"{BEGIN}\n\n{table(recorded())}\n\n{END}",
    )


def _table(cases: Iterable[Case], measured: Sequence[Figure]) -> str:
    names = [measure.name for measure in MEASURES]
    lines = [f"| family | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for family in sorted({case.family for case in cases}):
        worst = [
            max(f.error for f in measured if f.family == family and f.guarantee == name)
            for name in names
        ]
        lines.append(f"| {family} | {' | '.join(map(_shown, worst))} |")
    return "\n".join(lines)


def _variants() -> str:
    cases = CASES + MIXTURES
    lines = []
    for family in sorted({case.family for case in cases}):
        names = [case.name for case in cases if case.family == family]
        lines.append(f"- {family}: {'; '.join(names)}")
    return "\n".join(lines)


def _shown(error: float) -> str:
    return f"{error:.0e}" if error else "0"


if __name__ == "__main__":
    sys.stdout.write(page(figures()))

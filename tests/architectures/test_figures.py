"""The committed page matches the generated one except for figures, which are within tolerance."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.architectures.cases import MEASURED, Case
from tests.architectures.census import recorded
from tests.architectures.figures import Figure, figures, page
from tests.architectures.measures import MEASURES

COMMITTED = (Path(__file__).parents[2] / "docs" / "guarantees.md").read_text()
ROW = re.compile(r"^\| ([a-z0-9_]+) \| ((?:0|\de-\d\d)(?: \| (?:0|\de-\d\d))+) \|$", re.MULTILINE)


def without_figures(text: str) -> str:
    return ROW.sub(lambda row: row[1], text)


def test_committed_page_matches_the_generated_page() -> None:
    nothing = [Figure(c.family, c.name, m.name, 0.0) for c in MEASURED for m in MEASURES]
    assert without_figures(COMMITTED) == without_figures(page(nothing))


def test_every_committed_figure_is_within_its_tolerance() -> None:
    rows = ROW.findall(COMMITTED)
    assert len(rows) == len({case.family for case in MEASURED})
    for family, cells in rows:
        for measure, cell in zip(MEASURES, cells.split(" | "), strict=True):
            assert float(cell) <= measure.tolerance, (family, measure.name)


def test_census_has_no_crash_and_no_failed_check() -> None:
    states = Counter(found.state for found in recorded())
    assert states.keys() == {"served", "refused", "not built"}
    assert states["served"] >= 130


@pytest.mark.parametrize("case", MEASURED[:2], ids=lambda case: case.id)
def test_every_guarantee_has_figures(case: Case) -> None:
    measured = figures([case])
    assert [figure.guarantee for figure in measured] == [measure.name for measure in MEASURES]
    assert {(figure.family, figure.config) for figure in measured} == {(case.family, case.name)}

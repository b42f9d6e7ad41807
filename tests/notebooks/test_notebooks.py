"""The example notebooks run, and their outputs equal the saved ones."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Any

import pytest
from nbformat import NotebookNode

from tests.notebooks.execution import NOTEBOOKS, UNSAVED, executed, saved, tidied

# Colours are computed from figures whose last digits differ between machines.
STYLE = re.compile(r' style="[^"]*"')
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e-?\d+)?")


def shown(cell: NotebookNode) -> str:
    """Return the text of a cell's outputs: our HTML, and printed lines."""
    texts = []
    for output in cell.get("outputs", ()):
        data: Any = output.get("data", {})
        html = data.get("text/html", "")
        ours = html if 'class="januslens"' in html else ""  # frames look as pandas decides
        texts.append(STYLE.sub("", ours) or output.get("text", ""))
    return "".join(texts)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_saved_outputs_equal_those_of_a_new_run(name: str, server_address: str) -> None:
    fresh = executed(name, server_address)
    for before, now in zip_longest(saved(name).cells, tidied(fresh).cells):
        assert before.source == now.source
        expected, found = shown(before), shown(now)
        assert NUMBER.sub("#", found) == NUMBER.sub("#", expected)
        figures = [float(number) for number in NUMBER.findall(expected)]
        assert [float(n) for n in NUMBER.findall(found)] == pytest.approx(
            figures, rel=0.05, abs=0.011
        )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_has_its_saved_output(name: str) -> None:
    silent = ("client.close()", "import os")
    for cell in saved(name).cells:
        if cell.cell_type == "code" and not cell.source.startswith(silent):
            assert bool(cell.outputs) != (UNSAVED in cell.metadata.get("tags", ())), cell.source


@pytest.mark.parametrize(("name", "count"), [("surveys", 1), ("tour", 9)])
def test_displayed_tables_contain_no_script(name: str, count: int) -> None:
    tables = [shown(cell) for cell in saved(name).cells if 'class="januslens"' in shown(cell)]
    assert len(tables) >= count
    assert not any("<script" in table for table in tables)

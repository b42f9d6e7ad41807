"""The example notebook runs, and its outputs equal the saved ones."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Any

import pytest
from nbformat import NotebookNode

from tests.notebooks.execution import UNSAVED, executed, saved, tidied

# Colours are computed from figures whose last digits differ between machines.
STYLE = re.compile(r' style="[^"]*"')
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(scope="module")
def fresh(server_address: str) -> NotebookNode:
    return executed(server_address)


def shown(cell: NotebookNode) -> str:
    """Return the text of a cell's outputs: our HTML, and printed lines."""
    texts = []
    for output in cell.get("outputs", ()):
        data: Any = output.get("data", {})
        html = data.get("text/html", "")
        ours = html if 'class="januslens"' in html else ""  # frames look as pandas decides
        texts.append(STYLE.sub("", ours) or output.get("text", ""))
    return "".join(texts)


def test_saved_outputs_equal_those_of_a_new_run(fresh: NotebookNode) -> None:
    for before, now in zip_longest(saved().cells, tidied(fresh).cells):
        assert before.source == now.source
        expected, found = shown(before), shown(now)
        assert NUMBER.sub("#", found) == NUMBER.sub("#", expected)
        figures = [float(number) for number in NUMBER.findall(expected)]
        assert [float(n) for n in NUMBER.findall(found)] == pytest.approx(
            figures, rel=0.05, abs=0.011
        )


def test_every_cell_has_its_saved_output() -> None:
    silent = ("client.close()", "import os")
    for cell in saved().cells:
        if cell.cell_type == "code" and not cell.source.startswith(silent):
            assert bool(cell.outputs) != (UNSAVED in cell.metadata.get("tags", ())), cell.source


def test_displayed_tables_contain_no_script() -> None:
    tables = [shown(cell) for cell in saved().cells if 'class="januslens"' in shown(cell)]
    assert len(tables) >= 9
    assert not any("<script" in table for table in tables)

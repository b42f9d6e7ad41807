"""Where text goes, and what its tables look like."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_WIDTH_OF_FILES = 110


def console() -> Console:
    """Standard output: a terminal as wide as it is, anything else wide enough for a table."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_FILES
    return Console(width=width, highlight=False, markup=False, emoji=False)


def table(*headings: str) -> Table:
    """An empty table; a heading that starts with `>` belongs to a column of numbers."""
    grid = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="dim",
    )
    for heading in headings:
        justify: JustifyMethod = "right" if heading.startswith(">") else "left"
        grid.add_column(heading.removeprefix(">"), justify=justify)
    return grid


def section(title: str, grid: Table, note: str = "") -> Group:
    """A table below its title and above what its columns mean, with a line before it all."""
    parts: list[RenderableType] = [Text(f"\n{title}", "bold"), grid]
    if note:
        parts.append(Text(note, "dim"))
    return Group(*parts)


class Steps:
    """A bar of steps done, on standard error."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def of(self, total: int) -> None:
        """How many steps there will be."""
        self._progress.update(self._task, total=total)

    def done(self, what: str) -> None:
        """One more step is done."""
        self._progress.update(self._task, description=what, advance=1)


@contextmanager
def steps(what: str) -> Iterator[Steps]:
    """Show progress while something runs, if a person watches standard error."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn())
    with Progress(
        *columns, console=errors, transient=True, disable=not errors.is_terminal
    ) as progress:
        yield Steps(progress, progress.add_task(what, total=None))

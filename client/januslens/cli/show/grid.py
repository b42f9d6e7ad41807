"""Positions across, layers upward: the shape of both papers' pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from januslens._results.tokens import Token
from januslens.cli.show.console import table

_WIDEST = 12
_MARGIN = 8
_BETWEEN = 2

Cells = Mapping[tuple[int, int], Text]


def position_grids(prompt: Sequence[Token], cells: Cells, width: int) -> Iterator[Table]:
    """Tables of the `cells` by (layer, position), each with as many positions as fit."""
    layers = sorted({layer for layer, _ in cells}, reverse=True)
    for positions in _fitting(prompt, cells, width):
        grid = table(">layer")
        for position in positions:
            grid.add_column(_heading(position, prompt), max_width=_WIDEST, overflow="ellipsis")
        for layer in layers:
            row = (cells.get((layer, position), Text("")) for position in positions)
            grid.add_row(str(layer), *row)
        yield grid


def _fitting(prompt: Sequence[Token], cells: Cells, width: int) -> Iterator[list[int]]:
    """The positions in runs that are at most as wide as they may be."""
    run: list[int] = []
    used = _MARGIN
    for position in sorted({position for _, position in cells}):
        column = [_heading(position, prompt)]
        column += [cell for (_, where), cell in cells.items() if where == position]
        needed = min(_WIDEST, max(measured(cell) for cell in column)) + _BETWEEN
        if run and used + needed > width:
            yield run
            run, used = [], _MARGIN
        run.append(position)
        used += needed
    if run:
        yield run


def measured(cell: Text) -> int:
    """Terminal columns of the cell's longest line."""
    return max((cell_len(line) for line in cell.plain.split("\n")), default=0)


def _heading(position: int, prompt: Sequence[Token]) -> Text:
    token = str(prompt[position]) if position < len(prompt) else ""
    return Text(f"{position} {token}", no_wrap=True, overflow="ellipsis")

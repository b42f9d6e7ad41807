"""Positions across, layers upward: the shape of both papers' pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from januslens._results.tokens import Token
from januslens.cli.show.console import table

_WIDTHS = (12, 11, 10, 9, 8)
_MARGIN = 8
_BETWEEN = 2

Cells = Mapping[tuple[int, int], Text]


def position_grids(prompt: Sequence[Token], cells: Cells, width: int) -> Iterator[Table]:
    """Tables of the `cells` by (layer, position), each with as many positions as fit."""
    layers = sorted({layer for layer, _ in cells}, reverse=True)
    runs, widest = _fitting(_column_widths(prompt, cells), width)
    for positions in runs:
        grid = table(">layer")
        for position in positions:
            grid.add_column(_heading(position, prompt), max_width=widest, overflow="ellipsis")
        for layer in layers:
            row = (cells.get((layer, position), Text("")) for position in positions)
            grid.add_row(str(layer), *row)
        yield grid


def _column_widths(prompt: Sequence[Token], cells: Cells) -> dict[int, int]:
    """What each position's column would need."""
    widths: dict[int, int] = {}
    for (_, position), cell in sorted(cells.items(), key=lambda item: item[0][1]):
        known = widths.get(position, cell_len(_heading(position, prompt).plain))
        widths[position] = max(known, measured(cell))
    return widths


def _fitting(needed: Mapping[int, int], width: int) -> tuple[list[list[int]], int]:
    """Runs of positions no wider than `width`, and how wide a column may be: one run if it can."""
    for widest in _WIDTHS:
        runs = _runs(needed, width, widest)
        if len(runs) == 1:
            return runs, widest
    return _runs(needed, width, _WIDTHS[0]), _WIDTHS[0]


def _runs(needed: Mapping[int, int], width: int, widest: int) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    used = _MARGIN
    for position, natural in needed.items():
        column = min(natural, widest) + _BETWEEN
        if runs[-1] and used + column > width:
            runs.append([])
            used = _MARGIN
        runs[-1].append(position)
        used += column
    return runs


def measured(cell: Text) -> int:
    """Terminal columns of the cell's longest line."""
    return max((cell_len(line) for line in cell.plain.split("\n")), default=0)


def _heading(position: int, prompt: Sequence[Token]) -> Text:
    token = str(prompt[position]) if position < len(prompt) else ""
    return Text(f"{position} {token}", no_wrap=True, overflow="ellipsis")

"""Tables, cells and progress for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from januslens import _presentation as presentation
from januslens.results.models import CostEstimate, Provenance
from januslens.results.tokens import Token

_WIDTH_OF_FILES = 110


def console() -> Console:
    """Return a console for standard output, with a fixed width if it is not a terminal."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_FILES
    return _Output(width=width, highlight=False, markup=False, emoji=False)


class _Output(Console):
    """Goes on without output if its reader has ended, such as `head`: files are still written."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


def table(*headings: str) -> Table:
    """Return an empty table. The columns of headings that start with `>` are right-aligned."""
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
    """A table with its title above and a note on its columns below, after an empty line."""
    parts: list[RenderableType] = [Text(f"\n{title}", "bold"), grid]
    if note:
        parts.append(Text(note, "dim"))
    return Group(*parts)


class Steps:
    """A progress bar on standard error."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def of(self, total: int) -> None:
        """Set the total number of steps."""
        self._progress.update(self._task, total=total)

    def done(self, what: str) -> None:
        """Advance the bar by one step."""
        self._progress.update(self._task, description=what, advance=1)


@contextmanager
def steps(what: str) -> Iterator[Steps]:
    """Show a progress bar while the block runs, if standard error is a terminal."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn())
    with Progress(
        *columns, console=errors, transient=True, disable=not errors.is_terminal
    ) as progress:
        yield Steps(progress, progress.add_task(what, total=None))


_LEVELS = " ▁▂▃▄▅▆▇█"
_RANK_STYLES = {"top": "bold green", "< 10": "green", "< 100": "cyan", "< 1k": "blue"}


def token_cell(token: Token | None, style: str = "") -> Text:
    """One token, with visible signs for spaces and control characters."""
    return Text(str(token) if token else "", style, no_wrap=True, overflow="ellipsis")


def tokens_cell(tokens: Iterable[Token], sought: Sequence[Token] = (), style: str = "") -> Text:
    """Several tokens; those in `sought` are emphasised."""
    cell = Text(no_wrap=True, overflow="ellipsis", style=style)
    for token in tokens:
        found = any(token.id == one.id for one in sought)
        cell.append(str(token), "bold green" if found else "")
        cell.append("  ")
    cell.rstrip()
    return cell


def rank_cell(rank: int | None) -> Text:
    """A rank in the colour of its bin."""
    if rank is None:
        return Text("")
    style = _RANK_STYLES.get(presentation.rank_bin(rank), "dim")
    return Text(str(rank), style)


def probability_cell(probability: float | None, logarithm: float | None = None) -> Text:
    """A probability; small ones have an exponent."""
    if probability is None:
        return Text("")
    return Text(presentation.probability(probability, logarithm))


def percent_cell(share: float | None) -> Text:
    """A share of a sum in percent, with its sign."""
    return Text("" if share is None else presentation.percent(share))


def signed_cell(value: float | None) -> Text:
    """A number with its sign, red if negative."""
    if value is None:
        return Text("")
    return Text(presentation.signed(value), "red" if value < -0.005 else "")


def size_cell(value: float) -> Text:
    """A norm with three significant digits."""
    return Text(presentation.measure(value))


def level_cell(value: float, largest: float) -> Text:
    """A norm after a bar, whose height is on a square-root scale from 0 to `largest`."""
    level = round(presentation.norm_part(value, largest) * (len(_LEVELS) - 1))
    return Text(f"{_LEVELS[level]}{presentation.measure(value)}")


_WIDTHS = (12, 11, 10, 9, 8)
_MARGIN = 8
_BETWEEN = 2

Cells = Mapping[tuple[int, int], Text]


def position_grids(prompt: Sequence[Token], cells: Cells, width: int) -> Iterator[Table]:
    """Arrange `cells`, keyed by (layer, position), in tables with as many positions as fit."""
    layers = sorted({layer for layer, _ in cells}, reverse=True)
    runs, widest = _fitting(_column_widths(prompt, cells), width)
    for positions in runs:
        grid = table(">layer")
        for position in positions:
            grid.add_column(
                _position_heading(position, prompt), max_width=widest, overflow="ellipsis"
            )
        for layer in layers:
            row = (cells.get((layer, position), Text("")) for position in positions)
            grid.add_row(str(layer), *row)
        yield grid


def _column_widths(prompt: Sequence[Token], cells: Cells) -> dict[int, int]:
    """Return the width that the column of each position needs."""
    widths: dict[int, int] = {}
    for (_, position), cell in sorted(cells.items(), key=lambda item: item[0][1]):
        known = widths.get(position, cell_len(_position_heading(position, prompt).plain))
        widths[position] = max(known, measured(cell))
    return widths


def _fitting(needed: Mapping[int, int], width: int) -> tuple[list[list[int]], int]:
    """Split positions into runs that fit in `width`; also return the maximum width of a column.

    Narrower columns are used if that gives a single run.
    """
    for widest in _WIDTHS:
        runs = _position_runs(needed, width, widest)
        if len(runs) == 1:
            return runs, widest
    return _position_runs(needed, width, _WIDTHS[0]), _WIDTHS[0]


def _position_runs(needed: Mapping[int, int], width: int, widest: int) -> list[list[int]]:
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


# Positions in a table of layers and positions, for each layer that --rows permits.
COLUMNS_PER_ROW = 2


def left_out(shown: int, total: int, which: str) -> str:
    """The end of a note of a table that shows some of its rows or columns; empty if it has all."""
    return "" if shown == total else f"; shows {shown} of {total} {which} (see --rows)"


def measured(cell: Text) -> int:
    """Return the number of terminal columns of the cell's longest line."""
    return max((cell_len(line) for line in cell.plain.split("\n")), default=0)


def _position_heading(position: int, prompt: Sequence[Token]) -> Text:
    token = str(prompt[position]) if position < len(prompt) else ""
    return Text(f"{position} {token}", no_wrap=True, overflow="ellipsis")


def heading(prompt: Sequence[Token], provenance: Provenance) -> Table:
    """The prompt's tokens, numbered by position, and the model."""
    lines = labelled()
    lines.add_row("prompt", _numbered_tokens(prompt))
    lines.add_row("model", Text(presentation.model_name(provenance), "dim"))
    return lines


def labelled() -> Table:
    """An empty grid for lines with a label and a text, which may wrap."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=6)
    grid.add_column()
    return grid


def _numbered_tokens(prompt: Sequence[Token]) -> Text:
    pieces = [Text.assemble((f"{i}\u00a0", "dim"), str(token)) for i, token in enumerate(prompt)]
    return Text("  ").join(pieces)


def file_size(count: int) -> str:
    """Format a size in powers of 1024: `512 B`, `20.1 KiB`, `1.5 GiB`."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def cost_table(cost: CostEstimate) -> Table:
    """One row per figure; the last row says whether the request would be admitted."""
    grid = Table.grid(padding=(0, 2))
    rows = {
        "device": f"{cost.seconds:.3g} s",
        "operations": f"up to {cost.flops:.3g}",
        "memory": f"up to {file_size(cost.device_bytes)} in addition to the weights",
        "response": f"up to {file_size(cost.stream_bytes)}",
        "projections": f"up to {presentation.count(cost.projected_vectors)}",
    }
    for name, figure in rows.items():
        grid.add_row(Text(name, "dim"), Text(figure))
    verdict = Text("would be admitted", "green")
    if not cost.admissible:
        exceeded = ", ".join(violation.limit for violation in cost.exceeded)
        verdict = Text(f"would be refused: exceeds {exceeded}", "red")
    grid.add_row("", verdict)
    return grid


def sentence(parts: presentation.Sentence, emphasised: Sequence[Token]) -> Text:
    """A sentence; the tokens in `emphasised` are emphasised."""
    line = Text()
    for part in parts:
        found = not isinstance(part, str) and any(part.id == token.id for token in emphasised)
        line.append(str(part), "bold green" if found else "")
    return line

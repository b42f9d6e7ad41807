"""Report the rows of the table on a terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One benchmark: the measured figure and its goal, a maximum or (`at_least`) a minimum.

    `floor` names what `measured` is relative to or compared with; `seconds` are the medians from
    which it was computed. A row without a `goal` is only reported.
    """

    name: str
    measured: float
    unit: str
    goal: float | None
    floor: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    at_least: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal


def show(rows: Sequence[Row], machine: str) -> None:
    """Print the table."""
    table = Table(title=f"Januslens on {machine}", title_justify="left")
    for heading in ("", "goal", "measured", "", "floor"):
        table.add_column(heading, justify="right" if heading in {"goal", "measured"} else "left")
    for row in rows:
        sign = "≥" if row.at_least else "≤"
        goal = "" if row.goal is None else f"{sign} {_figure(row.goal)} {row.unit}"
        mark = {None: "", True: "reached", False: "missed"}[row.reached]
        table.add_row(row.name, goal, f"{_figure(row.measured)} {row.unit}", mark, row.floor)
    Console(width=None if Console().is_terminal else 150).print(table)


def write(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Write all rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [asdict(row) | {"reached": row.reached} for row in rows]
    path.write_text(json.dumps({"machine": machine, "rows": shown}, indent=2) + "\n")


def _figure(value: float) -> str:
    if abs(value) >= 20 or value == 0:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.0e}"

"""Figures by two axes, such as the effects of a sweep by layer and head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from januslens.results.exports import figure_of, notebook_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL = 8  # characters of a column in print
_MOST_DIGITS = 5  # decimals that fit in


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Figures by row and column, with their labels. Layers are printed from the last to the first.

    Attributes:
        title: What the figures are.
        row_axis: What the rows are, such as `layer`.
        rows: A label for each row.
        column_axis: What the columns are, such as `head`.
        columns: A label for each column.
        values: The figures, `[rows, columns]`; NaN where there is none.
    """

    title: str
    row_axis: str
    rows: tuple[str, ...]
    column_axis: str
    columns: tuple[str, ...]
    values: NDArray[np.float64]

    @property
    def largest(self) -> float:
        """The largest absolute value; 0 without any."""
        found = np.abs(self.values[~np.isnan(self.values)])
        return float(found.max(initial=0.0))

    @property
    def digits(self) -> int:
        """The decimals of the printed figures: 2, or up to 5 where all are small."""
        if not 0 < self.largest < 1:
            return 2
        return min(_MOST_DIGITS, 2 - math.floor(math.log10(self.largest)) - 1)

    def printed_rows(self) -> list[tuple[str, list[float]]]:
        """Return the rows in the order in which they are printed, each with its label."""
        rows = list(zip(self.rows, self.values.tolist(), strict=True))
        return rows[::-1] if self.row_axis == "layer" else rows

    def figure(self, *, ax: Axes | None = None) -> Figure:
        """Draw the map with matplotlib: decreases in blue, increases in red. Requires matplotlib.

        Args:
            ax: The axes to draw in; None = those of a new figure, which is not in pyplot's list of
                open figures.
        """
        return figure_of(self, ax)

    def __str__(self) -> str:
        """The figures as a table."""
        widest = max(map(len, self.rows), default=0)
        lines = [self.title]
        for label, row in self.printed_rows():
            numbers = " ".join(_number(value, self.digits).rjust(_LABEL) for value in row)
            lines.append(f"{label.ljust(widest)}  {numbers}".rstrip())
        columns = " ".join(label[:_LABEL].rjust(_LABEL) for label in self.columns)
        lines.append(" " * (widest + 2) + columns)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


def _number(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{value:+.{digits}f}"

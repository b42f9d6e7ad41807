"""The outcomes of a sweep of interventions, by layer and by head or position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from januslens.results import exports
from januslens.results.exports import notebook_html
from januslens.results.heat_map import HeatMap
from januslens.results.tokens import Token

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Outcome:
    """The prediction of one pass.

    Attributes:
        probability: The target's probability.
        logit: The target's logit, or its difference from that of the other token.
    """

    probability: float
    logit: float


@dataclass(frozen=True, eq=False)
class Sweep:
    """The outcomes of a sweep, by layer and by head or position.

    Attributes:
        title: What was changed.
        target: The token whose probability is measured.
        other: The token whose logit is subtracted; None if there is none.
        before: The outcome that `probabilities` and `logits` are compared with.
        layers: The layers, first axis of the arrays.
        columns: The heads or positions, second axis of the arrays.
        axis: What the columns are: `head`, `position` or `source`.
        labels: A label for each column.
        probabilities: The target's probability, `[layers, columns]`.
        logits: The target's logit, or its difference from that of the other token, of the same
        shape.
    """

    title: str
    target: Token
    other: Token | None
    before: Outcome
    layers: tuple[int, ...]
    columns: tuple[int, ...]
    axis: str
    labels: tuple[str, ...]
    probabilities: NDArray[np.float64]
    logits: NDArray[np.float64]

    @property
    def probability_effects(self) -> NDArray[np.float64]:
        """The changes of the target's probability, `[layers, columns]`."""
        return self.probabilities - self.before.probability

    @property
    def logit_effects(self) -> NDArray[np.float64]:
        """The changes of the logit or logit difference, `[layers, columns]`."""
        return self.logits - self.before.logit

    def largest(self, count: int = 5) -> list[tuple[int, int, float]]:
        """Return the layers and columns with the largest changes of the logit, and the changes."""
        effects = self.logit_effects
        order = np.argsort(-np.abs(effects), axis=None, kind="stable")[:count]
        places = zip(*np.unravel_index(order, effects.shape), strict=True)
        return [(self.layers[i], self.columns[j], float(effects[i, j])) for i, j in places]

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per layer and column. Requires pandas."""
        pandas = exports.require("pandas", "analysis", "a frame of a sweep")
        rows = pandas.MultiIndex.from_product(
            [self.layers, self.columns], names=["layer", self.axis]
        )
        frame: pd.DataFrame = pandas.DataFrame(
            {
                "probability": self.probabilities.ravel(),
                "probability_effect": self.probability_effects.ravel(),
                "logit": self.logits.ravel(),
                "logit_effect": self.logit_effects.ravel(),
            },
            index=rows,
        )
        return frame

    def heat_map(self) -> HeatMap:
        """Return the changes of the logit with their labels."""
        return HeatMap(
            title=self.heading,
            row_axis="layer",
            rows=tuple(f"layer {layer:>3}" for layer in self.layers),
            column_axis=self.axis,
            columns=self.labels,
            values=self.logit_effects,
        )

    def __str__(self) -> str:
        """The changes of the logit as a table, last layer first."""
        return str(self.heat_map())

    @property
    def heading(self) -> str:
        """What was changed, and what the changes are."""
        measured = f"logit of {self.target}" + (f" minus {self.other}" if self.other else "")
        return f"{self.title}: change of the {measured}, {self.before.logit:+.2f} before"

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

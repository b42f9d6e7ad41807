"""The attention of one layer and its gradients (Reversed Attention; Katz & Wolf, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from januslens.results import exports
from januslens.results.heat_map import HeatMap
from januslens.results.tokens import Token
from januslens.results.vectors import Floats
from januslens.v1 import gradient_lens_pb2

if TYPE_CHECKING:
    import pandas as pd

FIGURES = ("pattern", "pattern_gradient", "score_gradient")


class AttentionWeight(NamedTuple):
    """The attention of one head at one position to one source, and its gradients.

    Attributes:
        layer: Layer, from 0.
        head: Head, from 0.
        position: The query's position.
        source: The position that it attends to.
        probability: The attention probability.
        probability_gradient: The gradient of the loss with respect to the probability.
        score_gradient: The gradient of the loss with respect to the score.
    """

    layer: int
    head: int
    position: int
    source: int
    probability: float
    probability_gradient: float
    score_gradient: float


@dataclass(frozen=True, eq=False)
class AttentionGradient:
    """The attention of one layer, and the gradients of the loss with respect to it.

    The arrays are `[positions, heads, sources]` in float32. Positions and sources are those of the
    gradient's `prompt_tokens`.

    Attributes:
        layer: Layer, from 0.
        pattern: The attention probabilities.
        pattern_gradient: The gradients with respect to the probabilities, also for sources that
            a position does not attend to.
        score_gradient: The gradients with respect to the scores: the scaled products of query and
            key, before a soft cap and a position bias. 0 for sources that a position does not
            attend to.
    """

    layer: int
    pattern: Floats = field(repr=False)
    pattern_gradient: Floats = field(repr=False)
    score_gradient: Floats = field(repr=False)

    def largest(self, count: int = 10) -> list[AttentionWeight]:
        """Return the places with the largest gradients of the score, by absolute value."""
        sizes = np.abs(self.score_gradient)
        order = np.argsort(-sizes, axis=None, kind="stable")[:count]
        places = zip(*np.unravel_index(order, sizes.shape), strict=True)
        return [
            AttentionWeight(
                self.layer,
                int(head),
                int(position),
                int(source),
                float(self.pattern[position, head, source]),
                float(self.pattern_gradient[position, head, source]),
                float(self.score_gradient[position, head, source]),
            )
            for position, head, source in places
        ]

    def heat_map(
        self, head: int, figure: str = "score_gradient", tokens: Sequence[Token] = ()
    ) -> HeatMap:
        """Return one of the arrays for one head, by position and source.

        Args:
            head: The head.
            figure: `pattern`, `pattern_gradient` or `score_gradient`.
            tokens: The gradient's `prompt_tokens`, as labels.

        Raises:
            ValueError: There is no such figure.
            IndexError: There is no such head.
        """
        if figure not in FIGURES:
            raise ValueError(f"invalid figure {figure!r}; expected one of {', '.join(FIGURES)}")
        values: Floats = getattr(self, figure)[:, head].astype(np.float64)
        labels = tuple(str(token) for token in tokens)
        labels = labels or tuple(str(position) for position in range(len(values)))
        return HeatMap(
            title=f"{figure} of layer {self.layer}, head {head}",
            row_axis="position",
            rows=labels,
            column_axis="source",
            columns=labels,
            values=np.where(np.tri(len(values), dtype=bool), values, np.nan),
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per position, head and source up to the position.

        Requires pandas.
        """
        pandas = exports.require("pandas", "analysis", "a frame of attention")
        length, heads = self.pattern.shape[:2]
        positions, head, sources = np.nonzero(
            np.broadcast_to(np.tri(length, dtype=bool)[:, None], (length, heads, length))
        )
        index = pandas.MultiIndex.from_arrays(
            [positions, head, sources], names=["position", "head", "source"]
        )
        columns = {name: getattr(self, name)[positions, head, sources] for name in FIGURES}
        frame: pd.DataFrame = pandas.DataFrame(columns, index=index)
        return frame

    @classmethod
    def from_messages(
        cls, pieces: Sequence[gradient_lens_pb2.AttentionGradient]
    ) -> AttentionGradient:
        """Join the pieces of one layer."""
        arrays = (
            np.frombuffer(b"".join(getattr(piece, name).data for piece in pieces), "<f4")
            .astype(np.float32)
            .reshape(pieces[0].shape)
            for name in FIGURES
        )
        return cls(pieces[0].layer, *arrays)

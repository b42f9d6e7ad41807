"""Components of gradients as a pandas frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from januslens._extras import require
from januslens._results.components import Component
from januslens._results.tokens import Token

if TYPE_CHECKING:
    import pandas as pd

    from januslens._results.matrices import Matrix


def component_frame(matrices: Iterable[Matrix], prompt_tokens: Sequence[Token]) -> pd.DataFrame:
    """One row a component; `token` is missing where the prompt's tokens are not known."""
    pandas = require("pandas", "analysis", "a frame of components")
    rows = [
        _row(matrix, component, prompt_tokens)
        for matrix in matrices
        for component in matrix.components
    ]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=_COLUMNS)
    return frame.astype(dict.fromkeys(("expert", "predicted_rank", "target_rank"), "Int64"))


_COLUMNS = [
    "layer",
    "kind",
    "expert",
    "position",
    "token",
    "input_norm",
    "vjp_norm",
    "size",
    "promoted",
    "suppressed",
    "top_tokens",
    "bottom_tokens",
    "predicted_rank",
    "target_rank",
    "entropy_bits",
]


def _row(matrix: Matrix, component: Component, prompt_tokens: Sequence[Token]) -> list[Any]:
    read = component.projection
    known = component.position < len(prompt_tokens)
    return [
        matrix.layer,
        str(matrix.kind),
        matrix.expert,
        component.position,
        prompt_tokens[component.position].text if known else None,
        component.input_norm,
        component.vjp_norm,
        component.size,
        _texts(component.promoted),
        _texts(component.suppressed),
        _texts(read.top_tokens) if read else None,
        _texts(read.bottom_tokens) if read else None,
        component.predicted_rank,
        component.target_ranks[0] if component.target_ranks else None,
        read.entropy_bits if read else None,
    ]


def _texts(tokens: Iterable[Token]) -> list[str]:
    return [token.text for token in tokens]

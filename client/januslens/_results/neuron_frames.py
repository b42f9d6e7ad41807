"""Neurons that write a token as a pandas frame."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from januslens._extras import require

if TYPE_CHECKING:
    import pandas as pd

    from januslens._results.neurons import NeuronHit

_COLUMNS = [
    "layer",
    "expert",
    "neuron",
    "rank",
    "logit",
    "probability",
    "top_tokens",
    "bottom_tokens",
    "entropy_bits",
]


def neuron_frame(neurons: Iterable[NeuronHit]) -> pd.DataFrame:
    """One row a neuron; `expert` is missing where the MLP is a plain one."""
    pandas = require("pandas", "analysis", "a frame of neurons")
    frame: pd.DataFrame = pandas.DataFrame([_row(hit) for hit in neurons], columns=_COLUMNS)
    return frame.astype({"expert": "Int64"})


def _row(hit: NeuronHit) -> list[Any]:
    return [
        hit.layer,
        hit.expert,
        hit.neuron,
        hit.rank,
        hit.logit,
        hit.value.target_probability,
        [token.text for token in hit.value.top_tokens],
        [token.text for token in hit.value.bottom_tokens],
        hit.value.entropy_bits,
    ]

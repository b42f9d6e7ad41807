"""The events of an Activations stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from januslens_server.results.values import LayerLevel, Provenance, StageTime, Token


@dataclass(frozen=True)
class ActivationsHeader:
    """First event; `positions` are those that every tensor has."""

    provenance: Provenance
    prompt_tokens: Sequence[Token]
    positions: Sequence[int]
    limited_layers: Sequence[LayerLevel] = ()


@dataclass(frozen=True)
class SiteValues:
    """A piece of the values of one site, as bytes in `data_type`, row-major and little-endian.

    `shape` is that of the whole tensor, and `offset` the number of the piece's first element.
    `layer` is None for sites without one.
    """

    site: int
    layer: int | None
    shape: tuple[int, ...]
    offset: int
    data_type: str
    data: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return self.data.nbytes


@dataclass(frozen=True)
class ActivationsSummary:
    """Last event; a stream without one is incomplete."""

    times: Sequence[StageTime]


ActivationsEvent = ActivationsHeader | SiteValues | ActivationsSummary

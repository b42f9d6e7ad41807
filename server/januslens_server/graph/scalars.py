"""Numbers of many nodes and edges, gathered on the device and brought from it at once."""

from __future__ import annotations

import numpy as np
import torch

from januslens_server.errors import NotFinite
from januslens_server.results import Floats


class Scalars:
    """Columns of float32 numbers, filled in pieces; where nothing was added they are NaN."""

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []
        self._places: list[tuple[str, int]] = []

    def add(self, column: str, first: int, values: torch.Tensor) -> None:
        """Put `values` `[n]` at the places `first` to `first + n` of a column."""
        self._pieces.append(values)
        self._places.append((column, first))

    def columns(self, lengths: dict[str, int]) -> dict[str, Floats]:
        """The columns by name, each of so many numbers; they cross from the device in one piece.

        Raises `NotFinite` if one of the numbers is infinite.
        """
        found = {name: np.full(n, np.nan, dtype=np.float32) for name, n in lengths.items()}
        if self._pieces:
            flat = torch.cat(self._pieces).cpu().numpy()
            if np.isinf(flat).any():
                raise NotFinite("activations on this prompt are too large: float32 overflows")
            start = 0
            for (name, first), piece in zip(self._places, self._pieces, strict=True):
                found[name][first : first + len(piece)] = flat[start : start + len(piece)]
                start += len(piece)
        return found

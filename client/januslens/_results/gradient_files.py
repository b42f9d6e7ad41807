"""Factors of gradients as a safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from januslens._extras import require

if TYPE_CHECKING:
    from januslens._results.matrices import Matrix


def save(matrices: Iterable[Matrix], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write `NAME.input`, `NAME.vjp` and `NAME.position` of every matrix."""
    files = require("safetensors.numpy", "analysis", "saving factors")
    arrays: dict[str, NDArray[np.generic]] = {}
    for matrix in matrices:
        inputs, vjps = matrix.factors()
        positions = [component.position for component in matrix.components]
        arrays[f"{matrix.name}.input"] = inputs
        arrays[f"{matrix.name}.vjp"] = vjps
        arrays[f"{matrix.name}.position"] = np.array(positions, np.int64)
    files.save_file(arrays, path, metadata=dict(metadata))

"""Which weight matrices a request means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from januslens_server.errors import InvalidRequest
from januslens_server.models.resident import ResidentModel
from januslens_server.results import MatrixKind


@dataclass(frozen=True)
class MatrixChoice:
    """The asked-for kinds that this model has, and those it has not."""

    kinds: tuple[MatrixKind, ...]
    skipped: tuple[MatrixKind, ...]


def choose_matrices(
    model: ResidentModel, asked: Sequence[MatrixKind], field: str = "matrices"
) -> MatrixChoice:
    """Resolve kinds against the model: FF1 stands for GATE and UP where the MLP is gated.

    Raises `InvalidRequest` if none of the asked-for kinds exists.
    """
    present = {kind for block in model.view.blocks for kind in block.matrices}
    wanted: list[MatrixKind] = []
    for kind in asked or (MatrixKind.FF1, MatrixKind.FF2):
        gated = kind is MatrixKind.FF1 and kind not in present
        wanted += (MatrixKind.GATE, MatrixKind.UP) if gated else (kind,)
    unique = tuple(dict.fromkeys(wanted))
    kinds = tuple(kind for kind in unique if kind in present)
    if not kinds:
        names = ", ".join(kind.name for kind in sorted(present))
        raise InvalidRequest(field, f"expected some of {names} for {model.name}")
    return MatrixChoice(kinds, tuple(kind for kind in unique if kind not in present))


def layer_matrices(
    model: ResidentModel, layers: Sequence[int], kinds: Sequence[MatrixKind]
) -> list[tuple[int, MatrixKind]]:
    """The matrices of `kinds` that each of `layers` has: some models mix kinds of layers."""
    blocks = model.view.blocks
    return [(layer, kind) for layer in layers for kind in kinds if kind in blocks[layer].matrices]

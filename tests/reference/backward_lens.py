"""Compare factorized gradients with recorded Backward Lens calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from januslens_server.results import (
    NAMED_KINDS,
    Components,
    Floats,
    GradientMatrix,
    MatrixKind,
    Side,
)
from januslens_server.specs import GradientLensSpec, LensKind, LensSpec, NegativeLogLikelihood
from tests.reference.goldens import Golden, assert_same_ids
from tests.reference.gradients import Factorised
from tests.reference.lens import read
from tests.reference.model import ReferenceModel

Record = dict[str, Any]

# Difference of logits, relative to the largest of the row, that float32 cannot represent.
TIE = 1e-7

# The recording program uses Llama's up map as FF1 and does not record the gate.
SEPARATE = {
    "q": MatrixKind.Q,
    "k": MatrixKind.K,
    "v": MatrixKind.V,
    "o": MatrixKind.O,
    "ff2": MatrixKind.FF2,
}
FUSED = (MatrixKind.Q, MatrixKind.K, MatrixKind.V)


@dataclass
class BackwardErrors:
    """The amount compared, and the largest differences.

    Differences of factors are relative to the largest row, those of norms to at least 1, those of
    listed probabilities to the probability.
    """

    matrices: int = 0
    rows: int = 0
    readings: int = 0
    ties: int = 0
    factor: float = 0.0
    norm: float = 0.0
    probability: float = 0.0

    def widen(self, name: str, error: float) -> None:
        assert not np.isnan(error)
        setattr(self, name, max(getattr(self, name), error))


def spec_of(golden: Golden, lens: LensKind) -> GradientLensSpec:
    return GradientLensSpec(
        tuple(golden.data["input_ids"]),
        NegativeLogLikelihood((golden.data["target_id"],)),
        matrices=NAMED_KINDS,
        lens=LensSpec(5, 5, lens),
        components=0,
        include_factors=True,
    )


def recorded(golden: Golden) -> Iterator[tuple[int, MatrixKind, Record, Floats, Floats]]:
    """Return layer, kind, record and the factors x and delta of every matrix; split fused ones."""
    up = MatrixKind.UP if golden.data["arch"] == "llama" else MatrixKind.FF1
    kinds = SEPARATE | {"ff1": up}
    for layer in golden.data["layers"]:
        for name, record in layer["matrices"].items():
            key = f"L{layer['layer']}.{name}"
            x, delta = golden.arrays[f"{key}.x"], golden.arrays[f"{key}.delta"]
            if name != "qkv":
                yield layer["layer"], kinds[name], record, x, delta
                continue
            for kind, part in zip(FUSED, np.split(delta, 3, axis=1), strict=True):
                yield layer["layer"], kind, record, x, part


def compare(
    golden: Golden,
    found: Factorised,
    lens: LensKind,
    reference: ReferenceModel,
    errors: BackwardErrors,
) -> None:
    """Compare; raises AssertionError if ids, ranks, targets or predictions differ.

    `reference` identifies ranks that are ties in float32.
    """
    data = golden.data
    assert found.header.target_token_ids == (data["target_id"],)
    assert found.header.predicted_token_id == data["argmax_id"]
    errors.widen("norm", abs(found.header.loss - data["loss"]) / data["loss"])
    for layer, kind, record, x, delta in recorded(golden):
        matrix = found.matrices[layer, kind]
        errors.matrices += 1
        _compare_factors(matrix, x, delta, errors)
        fused = record["module"].endswith("c_attn")
        size = np.linalg.norm(x.T.astype(np.float64) @ delta) if fused else record["grad_fro"]
        errors.widen("norm", abs(matrix.frobenius_norm - float(size)) / max(float(size), 1e-3))
        side = "delta_lens" if matrix.projected_side is Side.VJP else "x_lens"
        if side in record:
            readings = record[side]["lens" if lens is LensKind.FINAL_NORM else "normed"]
            answer = "rank_argmax" if "rank_argmax" in readings else "rank_answer"
            _compare_lists(matrix.components, readings, errors)
            ranks = list(zip(readings["rank_target"], readings[answer], strict=True))
            _compare_ranks(matrix, ranks, lens, reference, errors)


def _compare_factors(
    matrix: GradientMatrix, x: Floats, delta: Floats, errors: BackwardErrors
) -> None:
    part = matrix.components
    assert part.inputs is not None
    assert part.vjps is not None
    for found, norms, wanted in (
        (part.inputs, part.input_norms, x),
        (part.vjps, part.vjp_norms, delta),
    ):
        rows = wanted[part.positions]
        sizes = np.linalg.norm(rows, axis=1)
        largest = max(float(sizes.max()), 1e-30)
        error = float(np.linalg.norm(found - rows, axis=1).max()) / largest
        errors.widen("factor", error)
        errors.widen("norm", float(np.abs(norms - sizes).max()) / max(largest, 1.0))
    errors.rows += len(part.positions)


def _compare_lists(part: Components, readings: Record, errors: BackwardErrors) -> None:
    table = part.projections
    for row, position in enumerate(part.positions.tolist()):
        if not table.projected[row]:
            continue
        errors.readings += 1
        for name, ids, chances in (
            ("top", table.top_ids, table.top_probabilities),
            ("bot", table.bottom_ids, table.bottom_probabilities),
        ):
            wanted = np.array(readings[f"{name}_p"][position])
            assert_same_ids(ids[row].tolist(), readings[name][position], wanted.tolist())
            error = np.abs(chances[row] - wanted) / wanted
            errors.widen("probability", float(error.max()))


def _compare_ranks(
    matrix: GradientMatrix,
    recorded_ranks: list[tuple[int, int]],
    lens: LensKind,
    reference: ReferenceModel,
    errors: BackwardErrors,
) -> None:
    """Compare the ranks of the target and of the model's own prediction."""
    part = matrix.components
    vectors = part.vjps if matrix.projected_side is Side.VJP else part.inputs
    assert vectors is not None
    found = np.stack([part.target_ranks[:, 0], part.predicted_ranks], axis=1)
    for row, position in enumerate(part.positions.tolist()):
        for column, wanted in enumerate(recorded_ranks[position]):
            if not part.projections.projected[row] or found[row, column] == wanted:
                continue
            vector = torch.from_numpy(vectors[row]).double()
            logits = read(reference, vector[None], lens).logits[0]
            token = part.projections.target_ids[row, column]
            ties = int(((logits - logits[token]).abs() <= TIE * logits.abs().max()).sum()) - 1
            assert abs(int(found[row, column]) - wanted) <= ties
            errors.ties += 1

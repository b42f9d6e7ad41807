"""The logit lens in float64: textbook softmax and full sorts, compared with the server's tables.

Where two float64 logits differ by less than float32 can represent, either order is accepted;
elsewhere ids and ranks must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from januslens_server.results import Ints, ProjectionTable
from januslens_server.specs import LensKind
from tests.reference.model import ReferenceModel


@dataclass(frozen=True)
class Readings:
    """Logits and probabilities `[n, V]` of n vectors, and their entropies `[n]` in bits."""

    logits: Tensor
    probabilities: Tensor
    entropy_bits: Tensor


def read(model: ReferenceModel, vectors: Tensor, kind: LensKind = LensKind.FINAL_NORM) -> Readings:
    """Apply final norm, unembedding and softmax to vectors `[n, d]`."""
    if kind is LensKind.NORMALIZED:
        vectors = vectors / vectors.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    if kind is not LensKind.RAW:
        vectors = model.final_norm(vectors)
    return softmax(model.unembed(vectors))


def softmax(logits: Tensor) -> Readings:
    exponentials = (logits - logits.max(-1, keepdim=True).values).exp()
    probabilities = exponentials / exponentials.sum(-1, keepdim=True)
    surprises = torch.where(probabilities > 0, -probabilities.log2(), 0.0)
    return Readings(logits, probabilities, (probabilities * surprises).sum(-1))


@dataclass
class ReadingErrors:
    """The largest differences.

    Those of logits are relative to the row's largest logit, and those of probabilities and bits to
    the larger of that logit and 1, because the precision of float32 is relative to the logits.
    `rows` counts readings, and `swaps` the ids in another place and the ranks that differ.
    """

    logit: float = 0.0
    probability: float = 0.0
    entropy_bits: float = 0.0
    rows: int = 0
    swaps: int = 0
    _resolution: float = field(default=1e-5)

    def add(self, readings: Readings, table: ProjectionTable) -> None:
        """Compare a table row by row; raises AssertionError for ids or ranks that are wrong."""
        size = readings.logits.abs().max(-1, keepdim=True).values
        ascending = readings.logits.argsort(dim=-1)
        self._list(readings, size, ascending.flip(-1), table.top_ids)
        self._list(readings, size, ascending, table.bottom_ids)
        self._ranks(readings, size, table)
        self._values(readings, size, table)
        self.rows += len(size)

    def _list(self, readings: Readings, size: Tensor, order: Tensor, listed: Ints) -> None:
        found = torch.from_numpy(listed)
        wanted = order[:, : found.shape[1]]
        apart = (readings.logits.gather(1, found) - readings.logits.gather(1, wanted)).abs() / size
        assert not found.numel() or apart.max() <= self._resolution
        assert all(len(set(row)) == len(row) for row in found.tolist())
        self.swaps += int((found != wanted).sum())

    def _ranks(self, readings: Readings, size: Tensor, table: ProjectionTable) -> None:
        targets, ranks = torch.from_numpy(table.target_ids), torch.from_numpy(table.target_ranks)
        for column in range(targets.shape[1]):
            target = readings.logits.gather(1, targets[:, column : column + 1])
            near = size * self._resolution
            assert (ranks[:, column] >= (readings.logits > target + near).sum(1)).all()
            assert (ranks[:, column] <= (readings.logits > target - near).sum(1) - 1).all()
            self.swaps += int((ranks[:, column] != (readings.logits > target).sum(1)).sum())

    def _values(self, readings: Readings, size: Tensor, table: ProjectionTable) -> None:
        for ids, logits, probabilities in (
            (table.top_ids, table.top_logits, table.top_probabilities),
            (table.bottom_ids, table.bottom_logits, table.bottom_probabilities),
            (table.target_ids, table.target_logits, table.target_probabilities),
        ):
            at = torch.from_numpy(ids)
            difference = (torch.from_numpy(logits) - readings.logits.gather(1, at)).abs() / size
            self.logit = max(self.logit, largest(difference))
            chances = torch.from_numpy(probabilities) - readings.probabilities.gather(1, at)
            self.probability = max(self.probability, largest(chances.abs() / size.clamp_min(1.0)))
        normalizers = torch.from_numpy(table.log_normalizers) - readings.logits.logsumexp(-1)
        self.logit = max(self.logit, largest(normalizers.abs() / size[:, 0].clamp_min(1.0)))
        bits = torch.from_numpy(table.entropy_bits) - readings.entropy_bits
        self.entropy_bits = max(self.entropy_bits, largest(bits.abs() / size[:, 0].clamp_min(1.0)))


def largest(values: Tensor) -> float:
    """Return the largest value, 0 for none; NaN stays NaN."""
    assert not values.isnan().any()
    return float(values.max()) if values.numel() else 0.0


def rows_of(table: ProjectionTable, rows: Ints) -> ProjectionTable:
    """Return the given rows of a table."""
    return ProjectionTable(**{name: column[rows] for name, column in vars(table).items()})

"""Logits of weight rows that requests met, so that those who meet them again need no product.

A row of the weights depends on no input: only the target whose rank is asked for differs from one
request to the next, and an exact rank needs all of the row's logits. So these are kept, as many as
fit, and ranks are counted anew.

Equal requests must get equal bytes, whatever was asked before them. That holds if a row's logits
and readings do not depend on which rows were computed with it: on a CPU they don't where the
numbers of rows are multiples of those that its kernels take at once, which is measured before the
cache is used.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from januslens_server.errors import CancelCheck, never_cancelled
from januslens_server.lens.head import LensHead
from januslens_server.lens.projection import (
    Readings,
    project,
    projection_table,
    read_logits,
    read_vectors,
    rows_at_once,
)
from januslens_server.results import Ints, ProjectionTable
from januslens_server.specs import LensKind, LensSpec

# Rows are computed by multiples of this, at least so many, and read that many at once.
ROWS = 16
# Tokens that are kept of each end; requests for more are not served from here.
ENDS = LensSpec(top_k=16, bottom_k=16)

_COLUMNS = [field.name for field in fields(Readings) if not field.name.startswith("target")]


@dataclass(frozen=True)
class _Wanted:
    """The rows `[m]` of a request that have keys, with their vectors and its targets `[m, t]`."""

    keys: Sequence[Hashable]
    vectors: torch.Tensor
    targets: torch.Tensor


class RowCache:
    """Keeps the logits of the rows met last, by key; for one thread at a time."""

    def __init__(self, head: LensHead, limit: int, rows: int) -> None:
        """Keep at most `limit` bytes of the logits of `rows` rows through the lens `head`.

        Nothing is kept where the lens is not on a CPU, or where rows do depend on those beside
        them.
        """
        vocab = head.unembedding.vocab
        self._head = head
        chunk = max(ROWS, rows_at_once(head) // ROWS * ROWS)
        # Every row once, and what the last chunk is padded with.
        self._capacity = min(limit // (4 * vocab), rows + chunk) // ROWS * ROWS
        self._at_once = min(chunk, self._capacity)
        usable = self._capacity > 0 and head.unembedding.device.type == "cpu"
        self.usable = usable and _alike(head)
        self.computed = 0  # vectors that were projected, the others being here already
        # Pages that nobody has written to take no memory.
        self._logits = torch.empty(self._capacity if self.usable else 0, vocab)
        self._readings: dict[str, torch.Tensor] = {}
        self._slots: dict[Hashable, int] = {}
        self._keys: list[Hashable] = [None] * self._capacity
        self._next = self._filled = 0

    @property
    def growth(self) -> int:
        """Bytes that it may still come to take: pages are taken when they are first written."""
        rows = self._capacity - self._filled if self.usable else 0
        return rows * self._logits.shape[1] * self._logits.itemsize

    def project(
        self,
        vectors: torch.Tensor,
        keys: Sequence[Hashable],
        spec: LensSpec,
        targets: torch.Tensor,
        check_cancelled: CancelCheck = never_cancelled,
    ) -> ProjectionTable:
        """As `lens.projection.project`; `keys` `[n]` name those of `vectors` that are weight rows.

        A key of None is no weight row. Equal keys must mean equal vectors.
        """
        wanted = np.array([key is not None for key in keys], dtype=bool)
        fits = max(spec.top_k, spec.bottom_k) <= ENDS.top_k and spec.kind is LensKind.FINAL_NORM
        if not (self.usable and fits and wanted.any()):
            self.computed += len(vectors)
            return project(self._head, vectors, spec, targets, check_cancelled)
        where = torch.from_numpy(np.flatnonzero(wanted))
        others = torch.from_numpy(np.flatnonzero(~wanted))
        named = _Wanted([key for key in keys if key is not None], vectors[where], targets[where])
        return self._projected(vectors, named, where, others, spec, targets, check_cancelled)

    @torch.inference_mode()
    def _projected(
        self,
        vectors: torch.Tensor,
        named: _Wanted,
        where: torch.Tensor,
        others: torch.Tensor,
        spec: LensSpec,
        targets: torch.Tensor,
        check_cancelled: CancelCheck,
    ) -> ProjectionTable:
        self.computed += len(others)
        parts = [
            *read_vectors(self._head, vectors[others], spec, targets[others], check_cancelled),
            *self._read(named, spec, check_cancelled),
        ]
        order = torch.cat([others, where]).argsort()
        joined = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])[order]
            for field in fields(Readings)
        }
        projected = (vectors != 0).any(-1)
        return projection_table(self._head, projected, [Readings(**joined)], targets)

    def _read(self, named: _Wanted, spec: LensSpec, check_cancelled: CancelCheck) -> list[Readings]:
        """Readings of the rows, in order: cached ones at once, others when they are computed."""
        rows = range(len(named.keys))
        known = [i for i in rows if named.keys[i] in self._slots]
        unknown: dict[Hashable, list[int]] = {}
        for i in rows:
            if named.keys[i] not in self._slots:
                unknown.setdefault(named.keys[i], []).append(i)
        order, parts = known, [self._kept(named, known, spec)] if known else []
        keys = list(unknown)
        for start in range(0, len(keys), self._at_once):
            check_cancelled()
            fresh = keys[start : start + self._at_once]
            self._add(fresh, named.vectors[[unknown[key][0] for key in fresh]])
            added = [i for key in fresh for i in unknown[key]]
            parts.append(self._kept(named, added, spec))
            order = order + added
        back = torch.tensor(order).argsort()
        return [
            Readings(
                **{
                    field.name: torch.cat([getattr(part, field.name) for part in parts])[back]
                    for field in fields(Readings)
                }
            )
        ]

    def _add(self, keys: Sequence[Hashable], vectors: torch.Tensor) -> None:
        """Compute and keep rows, in the places of those that came first.

        They get their keys when they are complete, so that none is kept if the memory runs out.
        """
        self.computed += len(keys)
        padded = _padded(vectors)
        if self._next + len(padded) > self._capacity:
            self._next = 0
        slots = range(self._next, self._next + len(padded))
        for slot in slots:
            self._slots.pop(self._keys[slot], None)
            self._keys[slot] = None
        self._filled = max(self._filled, slots.stop)
        logits = self._logits[slots.start : slots.stop]
        self._head.logits(self._head.prepare(padded, ENDS.kind), out=logits)
        for name, column in _read_alike(self._head, logits).items():
            if name not in self._readings:
                shape = (self._capacity, *column.shape[1:])
                self._readings[name] = column.new_empty(shape)
            self._readings[name][slots.start : slots.stop] = column
        for slot, key in zip(slots, keys, strict=False):
            self._slots[key], self._keys[slot] = slot, key
        self._next = slots.stop

    def _kept(self, named: _Wanted, rows: list[int], spec: LensSpec) -> Readings:
        """Readings of rows that are here, for their targets."""
        slots = [self._slots[named.keys[i]] for i in rows]
        targets = named.targets[rows]
        logits, ranks = self._ranks(slots, targets.numpy())
        columns = {name: column[slots] for name, column in self._readings.items()}
        for end, count in (("top", spec.top_k), ("bottom", spec.bottom_k)):
            for name in (f"{end}_ids", f"{end}_logits"):
                columns[name] = columns[name][:, :count]
        return Readings(**columns, target_logits=logits, target_ranks=ranks)

    def _ranks(self, slots: list[int], targets: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and ranks `[m, t]` of the targets: row by row, as a gather would copy them."""
        kept = self._logits.numpy()
        logits = np.empty(targets.shape, dtype=np.float32)
        ranks = np.empty(targets.shape, dtype=np.int64)
        for i, (slot, ids) in enumerate(zip(slots, targets.tolist(), strict=True)):
            row = kept[slot]
            for j, token in enumerate(ids):
                logits[i, j] = row[token]
                ranks[i, j] = np.count_nonzero(row > row[token])
        return torch.from_numpy(logits), torch.from_numpy(ranks)


def _padded(vectors: torch.Tensor) -> torch.Tensor:
    """The rows, and further ones that make their number a multiple."""
    missing = -len(vectors) % ROWS
    return torch.cat([vectors, vectors[:1].expand(missing, -1)]) if missing else vectors


def _read_alike(head: LensHead, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The readings of rows by column, always so many at once."""
    none = torch.empty(ROWS, 0, dtype=torch.long)
    parts = [read_logits(head, part, ENDS, none) for part in logits.split(ROWS)]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS}


@torch.inference_mode()
def _alike(head: LensHead) -> bool:
    """Whether rows come out bit by bit the same with other rows beside them."""
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(4 * ROWS, head.unembedding.d_model, generator=random)
    prepared = head.prepare(vectors, ENDS.kind)
    whole = head.logits(prepared)
    read = _read_alike(head, whole)
    for first, count in ((3, ROWS), (ROWS, 2 * ROWS), (5, 3 * ROWS)):
        part = slice(first, first + count)
        logits = head.logits(prepared[part])
        alike = torch.equal(logits, whole[part]) and all(
            torch.equal(column, read[name][part])
            for name, column in _read_alike(head, logits).items()
        )
        if not alike:
            return False
    return True

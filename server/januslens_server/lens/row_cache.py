"""Cache the logits of weight rows, so that later requests need no matrix product for the same rows.

A weight row does not depend on the prompt. Only the target differs between requests, and its exact
rank needs all logits of the row. So the cache stores the logits, and each request computes the
ranks of its target from them.

The same request must return the same bytes with and without cached rows. So the logits of a row
must not depend on the rows that are computed together with it. On a CPU this holds if the number of
rows is a multiple of the kernels' block size. The cache tests this and is not used if it does not
hold.

If a request needs more rows than the cache can store, replacing the oldest or the least recently
used rows would replace each row before it is needed again. So stored rows are only replaced by rows
that have been used more often (TinyLFU; Einziger, Friedman and Manes, 2017). Other new rows are
computed in a small window at the end of the cache, where they replace each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence, Set
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

# Rows are computed in multiples of this number, and their figures for this many rows at once.
ROWS = 16
# Tokens stored for each end; requests for more do not use the cache.
ENDS = LensSpec(top_k=16, bottom_k=16)

# Counts of uses are halved when rows were used this many times on average.
USES = 8

_COLUMNS = [field.name for field in fields(Readings) if not field.name.startswith("target")]


@dataclass(frozen=True)
class _Wanted:
    """The m weight rows of a request: keys, vectors `[m, d_model]` and targets `[m, t]`."""

    keys: Sequence[Hashable]
    vectors: torch.Tensor
    targets: torch.Tensor


class RowCache:
    """A cache of logits by row key, for use by one thread at a time."""

    def __init__(self, head: LensHead, limit: int, rows: int) -> None:
        """Create a cache of at most `limit` bytes for a model with `rows` weight rows.

        Nothing is stored if the lens is not on a CPU, or if the logits of a row depend on the rows
        computed with it.
        """
        vocab = head.unembedding.vocab
        self._head = head
        chunk = max(ROWS, rows_at_once(head) // ROWS * ROWS)
        # Room for every row once, for the padding of the last chunk, and for the window.
        self._capacity = min(limit // (4 * vocab), rows + 2 * chunk) // ROWS * ROWS
        self._at_once = min(chunk, max(ROWS, self._capacity // 4 // ROWS * ROWS), self._capacity)
        self._window = self._capacity - self._at_once  # the first slot of the window
        usable = self._capacity > 0 and head.unembedding.device.type == "cpu"
        self.usable = usable and _alike(head)
        self.computed = 0  # number of vectors that were not found in the cache
        self.found = 0  # number of weight rows that were found in the cache
        self.missed = 0  # number of weight rows that were not
        # Pages take no memory until they are written.
        self._logits = torch.empty(self._capacity if self.usable else 0, vocab)
        self._readings: dict[str, torch.Tensor] = {}
        self._slots: dict[Hashable, int] = {}
        self._keys: list[Hashable] = [None] * self._capacity
        self._next = self._filled = self._filled_window = 0
        self._uses = Counter[Hashable]()
        self._counted = 0

    @property
    def growth(self) -> int:
        """Bytes by which the cache may still grow; a page takes memory when it is first written."""
        filled = self._filled + self._filled_window
        rows = self._capacity - filled if self.usable else 0
        return rows * self._logits.shape[1] * self._logits.itemsize

    def project(
        self,
        vectors: torch.Tensor,
        keys: Sequence[Hashable],
        spec: LensSpec,
        targets: torch.Tensor,
        check_cancelled: CancelCheck = never_cancelled,
    ) -> ProjectionTable:
        """Project vectors as `lens.projection.project` does, with cached logits where possible.

        `keys` has a key for each vector that is a weight row, and None for other vectors. Vectors
        with equal keys must be equal.
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
        """Return the readings of weight rows in order; compute the rows that are not cached."""
        self._count(set(named.keys))
        rows = range(len(named.keys))
        known = [i for i in rows if named.keys[i] in self._slots]
        unknown: dict[Hashable, list[int]] = {}
        for i in rows:
            if named.keys[i] not in self._slots:
                unknown.setdefault(named.keys[i], []).append(i)
        order, parts = known, [self._kept(named, known, spec)] if known else []
        keys = list(unknown)
        self.found += len(known)
        self.missed += len(keys)
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
        """Compute and store rows.

        The keys are set last, so that a row is not used if computing it has failed.
        """
        self.computed += len(keys)
        padded = _padded(vectors)
        slots = self._place(keys, len(padded))
        for slot in slots:
            self._slots.pop(self._keys[slot], None)
            self._keys[slot] = None
        logits = self._logits[slots.start : slots.stop]
        self._head.logits(self._head.prepare(padded, ENDS.kind), out=logits)
        for name, column in _read_alike(self._head, logits).items():
            if name not in self._readings:
                shape = (self._capacity, *column.shape[1:])
                self._readings[name] = column.new_empty(shape)
            self._readings[name][slots.start : slots.stop] = column
        for slot, key in zip(slots, keys, strict=False):
            self._slots[key], self._keys[slot] = slot, key

    def _place(self, keys: Sequence[Hashable], count: int) -> range:
        """Return `count` slots for new rows: those of less used rows, or else of the window."""
        first = self._next if self._next + count <= self._window else 0
        slots = range(first, first + count)
        if slots.stop <= self._window:
            self._next = slots.stop  # other slots are compared next time
            stored = [key for key in self._keys[first : slots.stop] if key is not None]
            # One more use each: in a sequence that repeats, new rows have just been counted again.
            if self._used(keys) > self._used(stored) + len(stored):
                self._filled = max(self._filled, slots.stop)
                return slots
        self._filled_window = max(self._filled_window, count)
        return range(self._window, self._window + count)

    def _used(self, keys: Sequence[Hashable]) -> int:
        return sum(self._uses[key] for key in keys)

    def _count(self, keys: Set[Hashable]) -> None:
        """Count a use of each row; all counts are halved from time to time to forget old uses."""
        self._uses.update(keys)
        self._counted += len(keys)
        if self._counted > USES * len(self._uses):
            self._uses = Counter({key: n // 2 for key, n in self._uses.items() if n > 1})
            self._counted = 0

    def _kept(self, named: _Wanted, rows: list[int], spec: LensSpec) -> Readings:
        """Return the readings of cached rows for their targets."""
        slots = [self._slots[named.keys[i]] for i in rows]
        targets = named.targets[rows]
        logits, ranks = self._ranks(slots, targets.numpy())
        columns = {name: column[slots] for name, column in self._readings.items()}
        for end, count in (("top", spec.top_k), ("bottom", spec.bottom_k)):
            for name in (f"{end}_ids", f"{end}_logits"):
                columns[name] = columns[name][:, :count]
        return Readings(**columns, target_logits=logits, target_ranks=ranks)

    def _ranks(self, slots: list[int], targets: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and ranks `[m, t]` of the targets, row by row to avoid copying the rows."""
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
    """Pad the rows to a multiple of `ROWS`."""
    missing = -len(vectors) % ROWS
    return torch.cat([vectors, vectors[:1].expand(missing, -1)]) if missing else vectors


def _read_alike(head: LensHead, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the readings of rows by column, computed for `ROWS` rows at a time."""
    none = torch.empty(ROWS, 0, dtype=torch.long)
    parts = [read_logits(head, part, ENDS, none) for part in logits.split(ROWS)]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS}


@torch.inference_mode()
def _alike(head: LensHead) -> bool:
    """Whether the logits and readings of rows are bit-identical when computed with other rows."""
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

"""Cache the logits of weight rows, so that later requests need no matrix product for the same rows.

A weight row does not depend on the prompt. Only the target differs between requests, and its exact
rank needs all logits of the row. So the cache stores the logits, and each request computes the
ranks of its target from them.

The same request must return the same bytes with and without cached rows. So the logits of a row
must not depend on the rows that are computed together with it. On a CPU this holds if the number of
rows is a multiple of the kernels' block size. The cache tests this and is not used if it does not
hold.

Every row is stored while there is room. If a request needs more rows than the cache can store,
replacing the oldest or the least recently used rows would replace each row before it is needed
again. So in a full cache a stored row is only replaced by one that has been used more often
(TinyLFU; Einziger, Friedman and Manes, 2017). Other rows are computed, but not stored.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields

import numpy as np
import torch

from januslens_server.errors import CancelCheck, never_cancelled
from januslens_server.lens.head import LensHead
from januslens_server.lens.projection import (
    PendingTable,
    Readings,
    compute_logits,
    read_logits,
    read_vectors,
    rows_at_once,
    start_projection,
)
from januslens_server.results import Ints
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
        self._capacity = min(limit // (4 * vocab), rows)
        self._at_once = max(ROWS, rows_at_once(head) // ROWS * ROWS)
        usable = self._capacity > 0 and head.unembedding.device.type == "cpu"
        self.usable = usable and _alike(head)
        self.computed = 0  # number of vectors that were not found in the cache
        self.found = 0  # number of weight rows that were found in the cache
        self.missed = 0  # number of weight rows that were not
        # Pages take no memory until they are written.
        self._logits = torch.empty(self._capacity if self.usable else 0, vocab)
        self._readings: dict[str, torch.Tensor] = {}
        self._slots: dict[Hashable, int] = {}
        self._filled = 0
        self._uses = Counter[Hashable]()
        self._counted = 0

    @property
    def growth(self) -> int:
        """Bytes by which the cache may still grow; a page takes memory when it is first written."""
        return (len(self._logits) - self._filled) * self._logits.shape[1] * self._logits.itemsize

    def start_projection(
        self,
        vectors: torch.Tensor,
        keys: Sequence[Hashable],
        spec: LensSpec,
        targets: torch.Tensor,
        check_cancelled: CancelCheck = never_cancelled,
    ) -> PendingTable:
        """Start to project as `lens.projection.start_projection` does, with cached logits if any.

        `keys` has a key for each vector that is a weight row, and None for other vectors. Vectors
        with equal keys must be equal.
        """
        wanted = np.array([key is not None for key in keys], dtype=bool)
        fits = max(spec.top_k, spec.bottom_k) <= ENDS.top_k and spec.kind is LensKind.FINAL_NORM
        if not (self.usable and fits and wanted.any()):
            self.computed += len(vectors)
            return start_projection(self._head, vectors, spec, targets, check_cancelled)
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
    ) -> PendingTable:
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
        return PendingTable(self._head, projected, [Readings(**joined)], targets)

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
            fresh = {key: unknown[key] for key in keys[start : start + self._at_once]}
            parts.append(self._computed(named, fresh, spec))
            order = order + [i for rows in fresh.values() for i in rows]
        back = torch.tensor(order).argsort()
        return [
            Readings(
                **{
                    field.name: torch.cat([getattr(part, field.name) for part in parts])[back]
                    for field in fields(Readings)
                }
            )
        ]

    def _kept(self, named: _Wanted, rows: list[int], spec: LensSpec) -> Readings:
        """Return the readings of cached rows for their targets."""
        slots = [self._slots[named.keys[i]] for i in rows]
        return _of_targets(self._logits, self._readings, slots, named.targets[rows], spec)

    def _computed(
        self, named: _Wanted, fresh: Mapping[Hashable, list[int]], spec: LensSpec
    ) -> Readings:
        """Compute rows, given the indices of each, and store them; return their readings."""
        self.computed += len(fresh)
        vectors = _padded(named.vectors[[rows[0] for rows in fresh.values()]])
        logits = compute_logits(self._head, vectors, ENDS.kind)
        columns = _read_alike(self._head, logits)
        self._store(list(fresh), logits, columns)
        places = [place for place, rows in enumerate(fresh.values()) for _ in rows]
        targets = named.targets[[i for rows in fresh.values() for i in rows]]
        return _of_targets(logits, columns, places, targets, spec)

    def _store(
        self, keys: list[Hashable], logits: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> None:
        """Store those of the rows that fit, or that have been used more often than stored rows."""
        for name, column in columns.items():
            if name not in self._readings:
                self._readings[name] = column.new_empty(len(self._logits), *column.shape[1:])
        for place, slot in self._places(keys):
            self._logits[slot] = logits[place]
            for name, column in columns.items():
                self._readings[name][slot] = column[place]
            self._slots[keys[place]] = slot

    def _places(self, keys: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
        """Yield the index of each row to store with its slot, and forget the row stored there."""
        free = min(len(keys), len(self._logits) - self._filled)
        for place in range(free):
            self._filled += 1
            yield place, self._filled - 1
        uses = self._uses
        rest = sorted(range(free, len(keys)), key=lambda place: -uses[keys[place]])
        stored = heapq.nsmallest(len(rest), self._slots, key=uses.__getitem__)
        for place, old in zip(rest, stored, strict=False):
            # One use more: in a sequence that repeats, new rows have just been counted again.
            if uses[keys[place]] <= uses[old] + 1:
                return
            yield place, self._slots.pop(old)

    def _count(self, keys: Set[Hashable]) -> None:
        """Count a use of each row; all counts are halved from time to time to forget old uses."""
        self._uses.update(keys)
        self._counted += len(keys)
        if self._counted > USES * len(self._uses):
            self._uses = Counter({key: n // 2 for key, n in self._uses.items() if n > 1})
            self._counted = 0


def _of_targets(
    logits: torch.Tensor,
    columns: Mapping[str, torch.Tensor],
    places: list[int],
    targets: torch.Tensor,
    spec: LensSpec,
) -> Readings:
    """Return the readings of the rows at `places`, each for its targets `[m, t]`."""
    read = {name: column[places] for name, column in columns.items()}
    for end, count in (("top", spec.top_k), ("bottom", spec.bottom_k)):
        for name in (f"{end}_ids", f"{end}_logits"):
            read[name] = read[name][:, :count]
    target_logits, ranks = _ranks(logits, places, targets.numpy())
    return Readings(**read, target_logits=target_logits, target_ranks=ranks)


def _ranks(
    logits: torch.Tensor, places: list[int], targets: Ints
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and ranks `[m, t]` of the targets, row by row to avoid copying the rows."""
    every = logits.numpy()
    found = np.empty(targets.shape, dtype=np.float32)
    ranks = np.empty(targets.shape, dtype=np.int64)
    for i, (place, ids) in enumerate(zip(places, targets.tolist(), strict=True)):
        row = every[place]
        for j, token in enumerate(ids):
            found[i, j] = row[token]
            ranks[i, j] = np.count_nonzero(row > row[token])
    return torch.from_numpy(found), torch.from_numpy(ranks)


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

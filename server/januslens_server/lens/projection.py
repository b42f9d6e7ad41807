"""Project vectors to the vocabulary, many rows at a time.

Each chunk of rows takes one matrix product, and all figures are computed from its logits while they
are in memory. There is no full sort and no softmax in memory. Ranks are not computed from
probabilities, because small ones underflow to equal values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from januslens_server.errors import CancelCheck, NotFinite, never_cancelled
from januslens_server.lens.cpu import ThreadBuffers, on_free_cores
from januslens_server.lens.extremes import highest, lowest
from januslens_server.lens.head import LensHead
from januslens_server.results import ProjectionTable
from januslens_server.specs import LensKind, LensSpec
from januslens_server.transfer import HostCopy, to_host

# Maximum bytes of logits that one CPU core reads at once. More do not fit into its cache; with much
# fewer, Python takes longer than the computation.
CACHED_BYTES = 4 * 2**20
# Groups of columns in which the logits of a part are compared, subtracted and added. The temporary
# numbers of a group stay in a core's own cache. With fewer columns, Python takes longer.
COLUMN_GROUPS, FEWEST_COLUMNS = 12, 1024
# A term of e^-80 does not change a float32 sum that includes e^0. Below e^-87, exponentials are
# denormal numbers, which take a CPU 17 times as long.
LOWEST_EXPONENT = -80.0

_buffers = ThreadBuffers()
PartT = TypeVar("PartT")


@dataclass(frozen=True)
class Readings:
    """The figures of n rows of logits; shapes as in `ProjectionTable`.

    Logits, and the order of tokens, are those before the soft-cap. `log_normalizer` `[n]` and
    `entropy_bits` `[n]` are computed after the soft-cap.
    """

    top_ids: torch.Tensor
    top_logits: torch.Tensor
    bottom_ids: torch.Tensor
    bottom_logits: torch.Tensor
    log_normalizer: torch.Tensor
    entropy_bits: torch.Tensor
    target_logits: torch.Tensor
    target_ranks: torch.Tensor


@dataclass(frozen=True)
class Outcomes:
    """What n vectors predict, and the rank and log-probability `[n]` of one token in it.

    `top_ids` is `[n, top_k]`. `outcomes` returns them on the CPU.
    """

    top_ids: torch.Tensor
    ranks: torch.Tensor
    log_probabilities: torch.Tensor


@torch.inference_mode()
def project(
    head: LensHead,
    vectors: torch.Tensor,
    spec: LensSpec,
    targets: torch.Tensor | None = None,
    check_cancelled: CancelCheck = never_cancelled,
) -> ProjectionTable:
    """Project `vectors` `[n, d_model]`, and report on the tokens `targets` `[n, m]`.

    A rank is the number of tokens with a strictly larger logit (0 = best). Vectors that are exactly
    zero are marked as not projected, because the lens would show only biases. At most
    `head.chunk_bytes` of logits are in memory at once; `check_cancelled` is called before each such
    chunk.
    """
    return start_projection(head, vectors, spec, targets, check_cancelled).table()


@torch.inference_mode()
def start_projection(
    head: LensHead,
    vectors: torch.Tensor,
    spec: LensSpec,
    targets: torch.Tensor | None = None,
    check_cancelled: CancelCheck = never_cancelled,
) -> PendingTable:
    """Start to project as `project` does; a GPU computes on while the caller does other work."""
    if targets is None:
        targets = torch.empty(len(vectors), 0, dtype=torch.long, device=vectors.device)
    chunks = list(read_vectors(head, vectors, spec, targets, check_cancelled))
    return PendingTable(head, (vectors != 0).any(-1), chunks, targets)


@torch.inference_mode()
def outcomes(
    head: LensHead,
    vectors: torch.Tensor,
    token_id: int,
    top_k: int,
    check_cancelled: CancelCheck = never_cancelled,
) -> Outcomes:
    """Return figures that `project` returns as well, but list no tokens from the bottom.

    Raises `NotFinite` if the logits of a vector overflow float32.
    """
    found: list[Outcomes] = []
    at_once = rows_at_once(head)
    for start in range(0, len(vectors), at_once):
        check_cancelled()
        logits = compute_logits(head, vectors[start : start + at_once], LensKind.FINAL_NORM)

        def read(part: slice, logits: torch.Tensor = logits) -> Outcomes:
            return _outcomes(head, logits[part], token_id, top_k)

        found += _in_parts(logits, read)
    top_ids, ranks, log_probabilities = to_host(
        torch.cat([part.top_ids for part in found]),
        torch.cat([part.ranks for part in found]),
        torch.cat([part.log_probabilities for part in found]),
    )
    if bool(log_probabilities.isnan().any()):
        raise NotFinite("the logits of a projected vector overflow float32")
    return Outcomes(top_ids, ranks, log_probabilities)


def _outcomes(head: LensHead, logits: torch.Tensor, token_id: int, top_k: int) -> Outcomes:
    top_logits, top_ids = highest(logits, top_k)
    target_logits = logits[:, token_id, None]
    largest = top_logits[:, :1] if top_k else logits.amax(1, keepdim=True)
    sums = _sums(head, logits, largest, target_logits)
    return Outcomes(
        top_ids=top_ids,
        ranks=sums.larger[:, 0],
        log_probabilities=(head.cap(target_logits) - head.cap(largest))[:, 0] - sums.weights.log(),
    )


def read_vectors(
    head: LensHead,
    vectors: torch.Tensor,
    spec: LensSpec,
    targets: torch.Tensor | None,
    check_cancelled: CancelCheck = never_cancelled,
) -> Iterator[Readings]:
    """Yield the readings of consecutive groups of rows; at least one group, which may be empty.

    If `targets` is None, the target of each row is the last token of its bottom list.
    """
    at_once = rows_at_once(head)
    for start in range(0, len(vectors) or 1, at_once):
        check_cancelled()
        logits = compute_logits(head, vectors[start : start + at_once], spec.kind)
        part = None if targets is None else targets[start : start + at_once]
        yield from read_in_parts(head, logits, spec, part)


def compute_logits(head: LensHead, vectors: torch.Tensor, kind: LensKind) -> torch.Tensor:
    """Return logits `[n, vocab]` before the soft-cap, valid until this thread calls it again."""
    prepared = head.prepare(vectors, kind)
    logits = _buffers.matrix("logits", len(prepared), head.unembedding.vocab, vectors.device)
    return head.logits(prepared, out=logits)


def read_in_parts(
    head: LensHead, logits: torch.Tensor, spec: LensSpec, targets: torch.Tensor | None
) -> list[Readings]:
    """Call `read_logits` on parts of the rows; see `_in_parts`."""

    def read(part: slice) -> Readings:
        return read_logits(head, logits[part], spec, None if targets is None else targets[part])

    return _in_parts(logits, read)


def _in_parts(logits: torch.Tensor, read: Callable[[slice], PartT]) -> list[PartT]:
    """Call `read` with equal parts of the rows that fit into the CPU's cache, each on one core."""
    rows = len(logits)
    if logits.device.type == "cpu":
        cores, cached = torch.get_num_threads(), max(1, CACHED_BYTES // (4 * logits.shape[1]))
        rows = math.ceil(rows / (cores * math.ceil(rows / (cores * cached)))) if rows else 0
    parts = [slice(first, first + rows) for first in range(0, len(logits) or 1, rows or 1)]
    return on_free_cores(read, parts)


def rows_at_once(head: LensHead) -> int:
    """Return the number of rows in a chunk of logits."""
    return max(1, head.chunk_bytes // (4 * head.unembedding.vocab))


def read_logits(
    head: LensHead, logits: torch.Tensor, spec: LensSpec, targets: torch.Tensor | None
) -> Readings:
    """Compute the figures of logits `[n, vocab]`, before the soft-cap, for `targets` `[n, m]`.

    If `targets` is None, the target of each row is the last token of its bottom list.
    """
    top_logits, top_ids = highest(logits, spec.top_k)
    bottom_logits, bottom_ids = lowest(logits, spec.bottom_k)
    targets = bottom_ids[:, -1:] if targets is None else targets
    target_logits = logits.gather(1, targets)
    largest = top_logits[:, :1] if spec.top_k else logits.amax(1, keepdim=True)
    sums = _sums(head, logits, largest, target_logits)
    log_total = sums.weights.log()
    # With z = sum exp d, the entropy is log z - sum d exp d / z, in nats; p = 0 adds 0.
    entropy = log_total - sums.weighted / sums.weights
    return Readings(
        top_ids=top_ids,
        top_logits=top_logits,
        bottom_ids=bottom_ids,
        bottom_logits=bottom_logits,
        log_normalizer=head.cap(largest)[:, 0] + log_total,
        entropy_bits=entropy / math.log(2),
        target_logits=target_logits,
        target_ranks=sums.larger,
    )


class _Sums(NamedTuple):
    """Sums over the vocabulary, with d = logit - largest logit of the row, after the soft-cap.

    `weights` `[n]` are the sums of exp d, and `weighted` `[n]` those of d exp d. `larger` `[n, m]`
    is the number of logits that are strictly larger than each target's, before the soft-cap.
    """

    weights: torch.Tensor
    weighted: torch.Tensor
    larger: torch.Tensor


def _sums(
    head: LensHead, logits: torch.Tensor, largest: torch.Tensor, target_logits: torch.Tensor
) -> _Sums:
    """Compute all sums of logits `[n, vocab]`, one group of columns after the other.

    `largest` is `[n, 1]` and `target_logits` `[n, m]`, before the soft-cap. Both sums need only one
    exponential. Pairwise sums are used, because a dot product adds in sequence, which loses 0.005
    bits of entropy over 50,000 float32 terms.
    """
    capped = head.cap(largest)
    groups = [
        _Sums(*_weights(head.cap(columns), capped), _larger(columns, target_logits))
        for columns in logits.split(_columns_at_once(logits), dim=1)
    ]
    # A sum over stacked tensors would add in an order that depends on the number of rows.
    return _Sums(*(reduce(torch.add, found) for found in zip(*groups, strict=True)))


def _columns_at_once(logits: torch.Tensor) -> int:
    """Return the number of columns in a group, the same for any number of rows.

    So the sums of a row do not depend on other rows. A GPU reads all columns at once.
    """
    vocab = logits.shape[1]
    if logits.device.type != "cpu":
        return vocab
    return max(FEWEST_COLUMNS, math.ceil(vocab / COLUMN_GROUPS))


def _weights(logits: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums `[n]` of exp d and of d exp d."""
    below, weights = _buffers.like("first", logits), _buffers.like("second", logits)
    torch.sub(logits, largest, out=below).clamp_(min=LOWEST_EXPONENT)
    torch.exp(below, out=weights)
    return weights.sum(1), weights.mul_(below).sum(1)


def _larger(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Return how many logits of a row are strictly larger than each target's `[n, m]`.

    The comparison gives ones and zeros in float32. Their sums are exact up to 2^24, and several
    times faster than sums of booleans.
    """
    larger = _buffers.like("first", logits)
    counts = torch.empty(target_logits.shape, dtype=torch.long, device=logits.device)
    for i, column in enumerate(target_logits.unbind(1)):
        counts[:, i] = torch.gt(logits, column[:, None], out=larger).sum(1)
    return counts


class PendingTable:
    """A projection whose figures are computed on the device and on their way to the host."""

    def __init__(
        self,
        head: LensHead,
        projected: torch.Tensor,
        chunks: list[Readings],
        targets: torch.Tensor,
    ) -> None:
        """Join chunks into one table; `projected` `[n]` and `targets` `[n, m]` are of all rows."""

        def joined(name: str) -> torch.Tensor:
            return torch.cat([getattr(chunk, name) for chunk in chunks])

        log_z = joined("log_normalizer")
        columns = {
            "projected": projected,
            "top_ids": joined("top_ids"),
            "bottom_ids": joined("bottom_ids"),
            "entropy_bits": joined("entropy_bits"),
            "log_normalizers": log_z,
            "target_ids": targets,
            "target_ranks": joined("target_ranks"),
        }
        for end in ("top", "bottom", "target"):
            logits = head.cap(joined(f"{end}_logits"))
            columns[f"{end}_logits"] = logits
            columns[f"{end}_probabilities"] = (logits - log_z[:, None]).exp()
        self._names = list(columns)
        self._copy = HostCopy(*columns.values())

    def table(self) -> ProjectionTable:
        """Wait for the figures and return them.

        Raises `NotFinite` if the logits of a projected row overflow float32.
        """
        columns = dict(
            zip(self._names, (column.numpy() for column in self._copy.tensors()), strict=True)
        )
        for name in ("top_logits", "bottom_logits", "entropy_bits"):
            if not np.isfinite(columns[name][columns["projected"]]).all():
                raise NotFinite("the logits of a projected vector overflow float32")
        return ProjectionTable(**columns)

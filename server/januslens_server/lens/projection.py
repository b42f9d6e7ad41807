"""Vectors to vocabulary readings, many rows at a time.

One matrix product per chunk of rows, and every figure taken from the chunk's logits while they
are at hand: no full sort, no ranks from probabilities (they underflow into ties).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from januslens_server import telemetry
from januslens_server.lens.head import LensHead
from januslens_server.results import Floats, ProjectionTable
from januslens_server.specs import LensKind, LensSpec

# Logits of one chunk take at most this many bytes: the bound on a request's working memory.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Readings:
    """The figures of n rows of logits; shapes as in `ProjectionTable`.

    Logits are those before the soft-cap, by which everything is ordered; `log_normalizer` `[n]`
    and `entropy_bits` `[n]` are those of the capped ones.
    """

    top_ids: torch.Tensor
    top_logits: torch.Tensor
    bottom_ids: torch.Tensor
    bottom_logits: torch.Tensor
    log_normalizer: torch.Tensor
    entropy_bits: torch.Tensor
    target_logits: torch.Tensor
    target_ranks: torch.Tensor


@torch.inference_mode()
def project(
    head: LensHead,
    vectors: torch.Tensor,
    spec: LensSpec,
    targets: torch.Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> ProjectionTable:
    """Read `vectors` `[n, d_model]` through the lens; `targets` `[n, m]` token ids to report on.

    Rank counts the tokens with a strictly larger logit (0 = best). Rows that are exactly zero
    are reported as not projected: their lens would show only biases.
    """
    if targets is None:
        targets = torch.empty(len(vectors), 0, dtype=torch.long, device=vectors.device)
    telemetry.VECTORS_PROJECTED.inc(len(vectors))
    projected = (vectors != 0).any(-1)
    chunks = [
        read_logits(head, head.logits(rows), spec, targets[where])
        for where, rows in _prepared_chunks(head, vectors, spec.kind, chunk_bytes)
    ]
    return projection_table(head, projected, chunks, targets)


def _prepared_chunks(
    head: LensHead, vectors: torch.Tensor, kind: LensKind, chunk_bytes: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    rows = max(1, chunk_bytes // (4 * head.unembedding.shape[0]))
    for start in range(0, vectors.shape[0] or 1, rows):  # of no vectors one chunk of none
        where = slice(start, start + rows)
        yield where, head.prepare(vectors[where], kind)


def read_logits(
    head: LensHead, logits: torch.Tensor, spec: LensSpec, targets: torch.Tensor
) -> Readings:
    """Read rows of logits `[n, vocab]`, as `head` gives them, for `targets` `[n, m]`."""
    vocab = logits.shape[1]
    top_logits, top_ids = _ordered(*logits.topk(min(spec.top_k, vocab)), sign=-1)
    bottom_logits, bottom_ids = _ordered(
        *logits.topk(min(spec.bottom_k, vocab), largest=False), sign=1
    )
    target_logits = logits.gather(1, targets)
    capped = head.cap(logits)
    log_normalizer = capped.logsumexp(1)
    return Readings(
        top_ids=top_ids,
        top_logits=top_logits,
        bottom_ids=bottom_ids,
        bottom_logits=bottom_logits,
        log_normalizer=log_normalizer,
        entropy_bits=_entropy_bits(capped, log_normalizer),
        target_logits=target_logits,
        target_ranks=_ranks(logits, target_logits),
    )


def _ordered(
    values: torch.Tensor, ids: torch.Tensor, sign: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """By value, then by lower id: `topk` leaves the order among equals open."""
    ids, by_id = ids.sort(dim=1)
    values = values.gather(1, by_id)
    _, by_value = (sign * values).sort(dim=1, stable=True)
    return values.gather(1, by_value), ids.gather(1, by_value)


def _ranks(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    ranks = torch.empty(target_logits.shape, dtype=torch.long, device=logits.device)
    for i, column in enumerate(target_logits.unbind(1)):
        ranks[:, i] = (logits > column[:, None]).sum(1)
    return ranks


def _entropy_bits(logits: torch.Tensor, log_normalizer: torch.Tensor) -> torch.Tensor:
    """-sum p log2 p `[n]`; p = 0 contributes 0 because its finite log is multiplied by it.

    A sum, which adds in pairs, and no dot product, which adds in sequence: of 50,000 float32
    terms that loses 0.005 bit.
    """
    log_p = logits - log_normalizer[:, None]
    return -log_p.exp().mul_(log_p).sum(1) / math.log(2)


def projection_table(
    head: LensHead, projected: torch.Tensor, chunks: list[Readings], targets: torch.Tensor
) -> ProjectionTable:
    """The chunks in one table; `projected` `[n]` and `targets` `[n, m]` are those of all rows."""

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(chunk, name) for chunk in chunks])

    def probabilities(logits: torch.Tensor) -> Floats:
        return (logits - log_z).exp().cpu().numpy()

    log_z = joined("log_normalizer")[:, None]
    top, bottom, target = (head.cap(joined(f"{end}_logits")) for end in ("top", "bottom", "target"))
    return ProjectionTable(
        projected=projected.cpu().numpy(),
        top_ids=joined("top_ids").cpu().numpy(),
        top_logits=top.cpu().numpy(),
        top_probabilities=probabilities(top),
        bottom_ids=joined("bottom_ids").cpu().numpy(),
        bottom_logits=bottom.cpu().numpy(),
        bottom_probabilities=probabilities(bottom),
        entropy_bits=joined("entropy_bits").cpu().numpy(),
        target_ids=targets.cpu().numpy(),
        target_ranks=joined("target_ranks").cpu().numpy(),
        target_logits=target.cpu().numpy(),
        target_probabilities=probabilities(target),
    )

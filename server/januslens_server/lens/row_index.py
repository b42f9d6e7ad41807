"""An index of weight rows by the tokens that they promote and suppress.

Weight rows do not depend on a prompt, so their projections are computed once. A search for the
neurons that promote a token then only compares integers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from januslens_server.lens.head import LensHead
from januslens_server.lens.projection import Readings, read_vectors, rows_at_once
from januslens_server.specs import LensSpec
from januslens_server.transfer import to_host


class Listed(NamedTuple):
    """The m rows that list a token, with the token's rank and logit in each, `[m]`.

    A rank is the number of tokens with a strictly larger logit, or at the bottom a strictly smaller
    one.
    """

    rows: torch.Tensor
    ranks: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class RowIndex:
    """The top and bottom tokens of n rows' projections, on the CPU.

    Ids `[n, depth]` are int32. Logits `[n, depth]` are float32, before the soft-cap; the top lists
    start with the largest, the bottom lists with the smallest. `log_normalizer` and `entropy_bits`
    are `[n]`. `projected` `[n]` is False for rows of zeros, which are not projected. `bottom_ranks`
    `[n]` (int32) is the rank, from the top, of the last token in each bottom list.
    """

    projected: torch.Tensor
    top_ids: torch.Tensor
    top_logits: torch.Tensor
    bottom_ids: torch.Tensor
    bottom_logits: torch.Tensor
    bottom_ranks: torch.Tensor
    log_normalizer: torch.Tensor
    entropy_bits: torch.Tensor

    @property
    def depth(self) -> int:
        """Number of tokens in each list."""
        return self.top_ids.shape[1]

    def listing(self, token: int, *, suppressed: bool) -> Listed:
        """Return the rows that list `token` at the top, or at the bottom if `suppressed`."""
        ids = self.bottom_ids if suppressed else self.top_ids
        values = self.bottom_logits if suppressed else self.top_logits
        rows, places = torch.where((ids == token) & self.projected[:, None])
        logits = values[rows, places]
        further_out = (
            values[rows] < logits[:, None] if suppressed else values[rows] > logits[:, None]
        )
        return Listed(rows, further_out.sum(1), logits)

    def readings(self, listed: Listed, vocab: int, count: int, *, suppressed: bool) -> Readings:
        """Return the readings of the rows with `count` tokens per end and the token as target."""
        rows, ranks, logits = listed
        if suppressed:  # convert ranks from the bottom to ranks from the top
            bottom = self.bottom_logits[rows]
            equal = (bottom == logits[:, None]).sum(1)
            # Tokens beyond the list may have the same logit as its last token.
            at_cut = logits == bottom[:, -1]
            ranks = torch.where(at_cut, self.bottom_ranks[rows].long(), vocab - ranks - equal)
        return Readings(
            top_ids=self.top_ids[rows, :count].long(),
            top_logits=self.top_logits[rows, :count],
            bottom_ids=self.bottom_ids[rows, :count].long(),
            bottom_logits=self.bottom_logits[rows, :count],
            log_normalizer=self.log_normalizer[rows],
            entropy_bits=self.entropy_bits[rows],
            target_logits=logits[:, None],
            target_ranks=ranks[:, None],
        )


@torch.inference_mode()
def index_rows(
    head: LensHead,
    matrices: Iterable[torch.Tensor],
    depth: int,
) -> Generator[None, None, RowIndex]:
    """Index the rows of `matrices` `[rows, d_model]` in order, with `depth` tokens per end.

    Yields after every chunk, and returns the index.
    """
    spec = LensSpec(top_k=depth, bottom_k=depth)
    chunks = []
    for vectors in _chunks(matrices, rows_at_once(head)):
        chunks.append(_read(head, vectors.to(head.unembedding.device), spec))
        yield
    return _joined(chunks)


def _chunks(matrices: Iterable[torch.Tensor], rows: int) -> Iterator[torch.Tensor]:
    for matrix in matrices:
        yield from matrix.split(rows)


def _read(head: LensHead, vectors: torch.Tensor, spec: LensSpec) -> RowIndex:
    readings = list(read_vectors(head, vectors, spec, None))
    return _kept((vectors != 0).any(-1), readings)


def _kept(projected: torch.Tensor, parts: list[Readings]) -> RowIndex:
    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    columns = {
        "projected": projected,
        "top_ids": joined("top_ids").int(),
        "top_logits": joined("top_logits"),
        "bottom_ids": joined("bottom_ids").int(),
        "bottom_logits": joined("bottom_logits"),
        "bottom_ranks": joined("target_ranks")[:, 0].int(),
        "log_normalizer": joined("log_normalizer"),
        "entropy_bits": joined("entropy_bits"),
    }
    return RowIndex(**dict(zip(columns, to_host(*columns.values()), strict=True)))


def _joined(chunks: list[RowIndex]) -> RowIndex:
    columns = {name: [vars(chunk)[name] for chunk in chunks] for name in vars(chunks[0])}
    return RowIndex(**{name: torch.cat(parts) for name, parts in columns.items()})

"""Weight rows by the tokens at both ends of their projections.

Rows of the weights depend on no input, so what they promote and suppress is read once and kept:
the answer to "which neurons write this token" is then a search among small integers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from januslens_server.lens.head import LensHead
from januslens_server.lens.projection import Readings, read_vectors, rows_at_once
from januslens_server.specs import LensSpec


class Listed(NamedTuple):
    """The m rows that list a token: their numbers, its rank and its logit in each, `[m]`.

    Ranks count the tokens with a strictly larger logit, from the other end strictly smaller.
    """

    rows: torch.Tensor
    ranks: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class RowIndex:
    """Both ends of n rows' projections, on the CPU.

    Ids `[n, depth]` int32 and logits `[n, depth]` float32 before the soft-cap, each end from its
    outermost token inwards; `log_normalizer` and `entropy_bits` `[n]`; `projected` `[n]` is False
    for rows of zeros, which have no reading. `bottom_ranks` `[n]` int32 are the ranks from the top
    of the last tokens listed from the bottom.
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
        """How many tokens each end lists."""
        return self.top_ids.shape[1]

    def listing(self, token: int, *, suppressed: bool) -> Listed:
        """The rows that have `token` among their last tokens, or else among their first."""
        ids = self.bottom_ids if suppressed else self.top_ids
        values = self.bottom_logits if suppressed else self.top_logits
        rows, places = torch.where((ids == token) & self.projected[:, None])
        logits = values[rows, places]
        further_out = (
            values[rows] < logits[:, None] if suppressed else values[rows] > logits[:, None]
        )
        return Listed(rows, further_out.sum(1), logits)

    def readings(self, listed: Listed, vocab: int, count: int, *, suppressed: bool) -> Readings:
        """What a projection with `count` tokens of each end says of the rows and the token."""
        rows, ranks, logits = listed
        if suppressed:  # from the top: the rest, without those of its own logit
            bottom = self.bottom_logits[rows]
            equal = (bottom == logits[:, None]).sum(1)
            # Tokens beyond the list may share the logit of its last one.
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
    """Read the rows of `matrices` `[rows, d_model]`, one after the other, `depth` tokens deep.

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
        return torch.cat([getattr(part, name) for part in parts]).cpu()

    return RowIndex(
        projected=projected.cpu(),
        top_ids=joined("top_ids").int(),
        top_logits=joined("top_logits"),
        bottom_ids=joined("bottom_ids").int(),
        bottom_logits=joined("bottom_logits"),
        bottom_ranks=joined("target_ranks")[:, 0].int(),
        log_normalizer=joined("log_normalizer"),
        entropy_bits=joined("entropy_bits"),
    )


def _joined(chunks: list[RowIndex]) -> RowIndex:
    columns = {name: [vars(chunk)[name] for chunk in chunks] for name in vars(chunks[0])}
    return RowIndex(**{name: torch.cat(parts) for name, parts in columns.items()})

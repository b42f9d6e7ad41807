"""Tokens, logit-lens readings and stage times: what both streams are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from januslens_server.results.arrays import Flags, Floats, Ints


class Token(NamedTuple):
    """A vocabulary entry; `start` and `end` are characters of the prompt it was read from."""

    id: int
    text: str
    raw: bytes
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class ProjectionTable:
    """Logit-lens rows of n vectors, best first.

    Ids and values of the top are `[n, top_k]`, of the bottom `[n, bottom_k]`, lowest first; the
    rest is `[n]`, of the m targets `[n, m]` (probability, logit, rank; rank 0 = best). `projected`
    is False where a vector was exactly zero and has no reading.
    """

    projected: Flags
    top_ids: Ints
    top_logits: Floats
    top_probabilities: Floats
    bottom_ids: Ints
    bottom_logits: Floats
    bottom_probabilities: Floats
    entropy_bits: Floats
    target_ids: Ints
    target_ranks: Ints
    target_logits: Floats
    target_probabilities: Floats

    def rows(self, where: slice) -> ProjectionTable:
        """Some of the rows."""
        return ProjectionTable(**{name: column[where] for name, column in vars(self).items()})


@dataclass(frozen=True)
class StageTime:
    """Seconds that a stage of the request took."""

    stage: str
    seconds: float

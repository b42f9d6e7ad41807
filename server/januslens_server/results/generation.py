"""Events of a Generate stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from januslens_server.results.values import Provenance, StageTime, Token


class FinishReason(StrEnum):
    """Why a generation ended, as in `streams.proto`."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_TEXT = "stop_text"
    MAX_NEW_TOKENS = "max_new_tokens"
    MAX_POSITIONS = "max_positions"


@dataclass(frozen=True)
class LayerOutcome:
    """What the output of a layer predicts; rank and probability are the generated token's."""

    layer: int
    rank: int
    probability: float
    log_probability: float
    top_ids: Sequence[int]


@dataclass(frozen=True)
class GenerationHeader:
    """First event of a generation."""

    provenance: Provenance
    prompt_tokens: Sequence[Token]


@dataclass(frozen=True)
class GeneratedToken:
    """A generated token; its figures are those of the model's own distribution."""

    token: Token
    log_probability: float
    entropy_bits: float
    top_ids: Sequence[int]
    top_probabilities: Sequence[float]
    layers: Sequence[LayerOutcome] = ()

    @property
    def nbytes(self) -> int:
        """Approximate size of its message."""
        return 128 + 48 * (len(self.top_ids) + sum(2 + len(read.top_ids) for read in self.layers))


@dataclass(frozen=True)
class GenerationSummary:
    """Last event of a generation; a stream without it is incomplete."""

    generated: int
    times: Sequence[StageTime]
    finish_reason: FinishReason


GenerationEvent = GenerationHeader | GeneratedToken | GenerationSummary

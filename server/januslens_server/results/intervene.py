"""The events of an Intervene stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from januslens_server.results.values import Provenance, StageTime, Token


@dataclass(frozen=True)
class Outcome:
    """The prediction at one position; `logit_difference` is None without a second token."""

    position: int
    target_token_id: int
    target_probability: float
    target_logit: float
    target_rank: int
    logit_difference: float | None
    kl_nats: float
    top_token_ids: Sequence[int]
    top_probabilities: Sequence[float]
    target_log_probability: float


@dataclass(frozen=True)
class Coordinates:
    """The place of an experiment in its sweep; None for axes that are not split."""

    layer: int | None = None
    position: int | None = None
    head: int | None = None
    neuron: int | None = None
    source_position: int | None = None


@dataclass(frozen=True)
class InterveneHeader:
    """First event; `at_once` is the largest number of experiments that run as a batch."""

    provenance: Provenance
    prompt_tokens: Sequence[Token]
    positions: Sequence[int]
    before: Sequence[Outcome]
    experiments: int
    at_once: int


@dataclass(frozen=True)
class ExperimentEffect:
    """The predictions under one experiment."""

    experiment: int
    label: str
    coordinates: Coordinates
    after: Sequence[Outcome]


@dataclass(frozen=True)
class ExperimentEffects:
    """The effects of a batch of experiments."""

    effects: Sequence[ExperimentEffect]

    @property
    def nbytes(self) -> int:
        """Approximate size of the messages."""
        return sum(64 + 64 * len(effect.after) for effect in self.effects)


@dataclass(frozen=True)
class InterveneSummary:
    """Last event; a stream without one is incomplete."""

    effects: int
    times: Sequence[StageTime]


InterveneEvent = InterveneHeader | ExperimentEffects | InterveneSummary

"""Results of the RPCs that answer with a single message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from januslens_server.results.values import (
    Guarantee,
    Ints,
    ModelFacts,
    ProjectionTable,
    Provenance,
    Token,
)


@dataclass(frozen=True)
class Cost:
    """An estimate: `seconds` of the device, `memory` on it and `stream` to the caller in bytes.

    `held` of the memory is kept between two steps, the rest is needed while a step computes.
    """

    seconds: float = 0.0
    memory: int = 0
    stream: int = 0
    held: int = 0


@dataclass(frozen=True)
class Effect:
    """A prompt's next-token distribution before and after an edit; ranks count from 0."""

    label: str
    target_token_id: int
    probability_before: float
    probability_after: float
    rank_before: int
    rank_after: int
    predicted_before: int
    predicted_after: int
    kl_bits: float


@dataclass(frozen=True)
class EditPreview:
    """What an edit did to its own prompt and to the probes, in their order."""

    edited: Effect
    probes: Sequence[Effect]
    provenance: Provenance


@dataclass(frozen=True)
class FoundNeurons:
    """One page of the neurons whose value promotes, or suppresses, `token`, best first.

    `layers`, `experts` (-1: none), `neurons` and `ranks` are `[n]`, the ranks counted from the end
    that was searched, `depth` tokens deep; `projections` has the token as its target. `total`
    counts the neurons of all pages.
    """

    token: Token
    layers: Ints
    experts: Ints
    neurons: Ints
    ranks: Ints
    projections: ProjectionTable
    depth: int
    total: int
    provenance: Provenance


class ModelState(IntEnum):
    """Where a configured model stands; numbers as in `models.proto`."""

    LOADING = 1
    READY = 2
    FAILED = 3


@dataclass(frozen=True)
class ModelStatus:
    """What is known of a configured model; provenance and facts only once it is loaded."""

    name: str
    state: ModelState
    reason: str = ""
    provenance: Provenance | None = None
    facts: ModelFacts | None = None
    guarantees: Sequence[Guarantee] = ()

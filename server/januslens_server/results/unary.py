"""Results of the RPCs with a single response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from januslens_server.results.values import (
    Guarantee,
    Ints,
    LayerLevel,
    ModelFacts,
    ProjectionTable,
    Provenance,
    Token,
)


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a request.

    `seconds` is device time. `memory` is in bytes on the device; `held` of them stay in use between
    two steps of the request. `stream` is the size of the response in bytes.
    `generated` is the number of tokens to generate.
    """

    seconds: float = 0.0
    memory: int = 0
    stream: int = 0
    held: int = 0
    generated: int = 0


@dataclass(frozen=True)
class Effect:
    """The next-token distribution of a prompt before and after an edit; ranks count from 0."""

    label: str
    target_token_id: int
    probability_before: float
    probability_after: float
    rank_before: int
    rank_after: int
    predicted_before: int
    predicted_after: int
    kl_bits: float
    log_probability_before: float
    log_probability_after: float


@dataclass(frozen=True)
class EditPreview:
    """The effects of an edit on its own prompt and on the probes, in their order.

    `layer` and `strength` are those of an edit of a grid. `gradient_cosine` is that of a shift and
    a descent step; None unless requested.
    """

    edited: Effect
    probes: Sequence[Effect]
    provenance: Provenance
    layer: int | None = None
    strength: float | None = None
    gradient_cosine: float | None = None


@dataclass(frozen=True)
class FoundNeurons:
    """One page of the neurons that promote or suppress `token`, best first.

    `layers`, `experts` (-1 = none), `neurons` and `ranks` are `[n]`. Ranks are counted from the
    searched end and are below `depth`. `projections` has the token as its target. `total` is the
    number of neurons on all pages.
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
    limited_layers: Sequence[LayerLevel] = ()


class ModelState(IntEnum):
    """The state of a model; numbers as in `models.proto`."""

    LOADING = 1
    READY = 2
    FAILED = 3
    UNLOADING = 4


@dataclass(frozen=True)
class ModelStatus:
    """The status of a model; provenance and facts are None until it is loaded.

    `loaded_fraction` is the share of its loading that is done.
    """

    name: str
    state: ModelState
    reason: str = ""
    provenance: Provenance | None = None
    facts: ModelFacts | None = None
    guarantees: Sequence[Guarantee] = ()
    levels: Sequence[LayerLevel] = ()
    loaded_fraction: float = 0.0

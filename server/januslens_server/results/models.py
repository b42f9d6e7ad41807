"""What is known of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True)
class Provenance:
    """Which weights computed a result, where and with what."""

    model: str
    revision: str
    architecture: str
    data_type: str
    device: str
    attention: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Guarantee:
    """One property of a model that was measured when it was loaded."""

    name: str
    measured_error: float
    tolerance: float

    @property
    def held(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.measured_error <= self.tolerance


@dataclass(frozen=True)
class ModelFacts:
    """The sizes of a model, as the contract names them."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_experts: int
    vocab_size: int
    max_positions: int


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

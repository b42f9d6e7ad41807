"""What an edit would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from januslens_server.results.models import Provenance


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

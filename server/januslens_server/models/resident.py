"""A model that is loaded and ready to be looked into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from januslens_server.models.tokens import Vocabulary
from januslens_server.models.views import ModelView
from januslens_server.results import Provenance


@dataclass(frozen=True)
class ResidentModel:
    """The weights (frozen, in evaluation mode), their parts, tokenizer and provenance."""

    name: str
    network: PreTrainedModel
    view: ModelView
    vocabulary: Vocabulary
    provenance: Provenance

    @property
    def device(self) -> torch.device:
        """Where prompts go and the lens computes."""
        return self.view.lens.unembedding.device

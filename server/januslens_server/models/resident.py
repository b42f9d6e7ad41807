"""A model that is loaded and ready to be looked into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from januslens_server.models.neuron_index import NeuronIndex
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.models.tokens import Vocabulary
from januslens_server.models.views import ModelView
from januslens_server.results import Provenance


@dataclass(frozen=True)
class ResidentModel:
    """The weights (frozen, in evaluation mode), their parts, tokenizer and provenance.

    `cache` is where the next server finds what is computed once per model.
    """

    name: str
    network: PreTrainedModel
    view: ModelView
    vocabulary: Vocabulary
    provenance: Provenance
    cache: TensorCache | None = None

    @cached_property
    def neurons(self) -> NeuronIndex:
        """What the neurons write, read layer by layer when it is asked for."""
        return NeuronIndex(self.view, self.provenance, self.cache)

    @property
    def device(self) -> torch.device:
        """Where prompts go and the lens computes."""
        return self.view.lens.unembedding.device

"""Mistral: Llama's block whose layers may all attend through a sliding window.

Distinct points:
- `sliding_window` holds for every layer, own position included; None: all positions;
- no biases anywhere.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    llama_like,
    pre_norm_block,
)
from januslens_server.models.adapters.parts import lens, rms_norm
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `MistralForCausalLM`."""
    decoder: Any = model.model
    return llama_like(model, _block, lens(model, rms_norm(decoder.norm)))


def _block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer, window=layer.config.sliding_window))

"""Mistral: Llama's block whose layers may all attend through a sliding window.

Distinct points:
- `sliding_window` holds for every layer, own position included; None: all positions;
- no biases anywhere.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `MistralForCausalLM`."""
    return llama_like(model, _block)


def _block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer, window=layer.config.sliding_window))

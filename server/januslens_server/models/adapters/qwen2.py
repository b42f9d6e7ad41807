"""Qwen2 and Qwen2.5: Llama's block with biased queries, keys and values.

Distinct points:
- query, key and value have biases, the output projection has none;
- `layer_types` says which layers attend through the sliding window.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Qwen2ForCausalLM`."""
    return llama_like(model, _block)


def _block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer, window=layer.window))

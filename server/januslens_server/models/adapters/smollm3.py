"""SmolLM3: Llama's block, some of whose layers have no positions at all.

Distinct points:
- layers with a 0 in `no_rope_layers` do not turn queries and keys;
- `layer_types` says which layers attend through the sliding window.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `SmolLM3ForCausalLM`."""
    return llama_like(model, _block)


def _block(layer: Layer) -> Block:
    found = attention(layer, window=layer.window)
    turns = layer.config.no_rope_layers[layer.number]
    return pre_norm_block(layer, found if turns else replace(found, rotation=None))

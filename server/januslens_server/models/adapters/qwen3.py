"""Qwen3: Llama's block with a norm of every head's queries and keys.

Distinct points:
- queries and keys pass an RMSNorm over each head, the same weights for all heads, before they turn;
- `d_head` is a setting of its own;
- `layer_types` says which layers attend through the sliding window.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.adapters.parts import rms_head_map
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Qwen3ForCausalLM`."""
    return llama_like(model, _block)


def _block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    normed = replace(
        attention(layer, window=layer.window),
        query_map=rms_head_map(attn.q_norm),
        key_map=rms_head_map(attn.k_norm),
    )
    return pre_norm_block(layer, normed)

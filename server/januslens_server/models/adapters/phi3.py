"""Phi-3 and Phi-4: Llama's block with fused projections.

Distinct points:
- `qkv_proj` holds all queries, then all keys, then all values; `gate_up_proj` gate, then up;
- part of a head's dimensions may turn; long contexts rescale the rotation (LongRoPE);
- `sliding_window` holds for every layer.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import (
    Layer,
    Projections,
    attention,
    llama_like,
    pre_norm_block,
)
from januslens_server.models.adapters.parts import consecutive, linear
from januslens_server.models.views import Block, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Phi3ForCausalLM`."""
    return llama_like(model, _block)


def _block(layer: Layer) -> Block:
    attn, mlp, config = layer.module.self_attn, layer.module.mlp, layer.config
    queries, keys = (
        n * attn.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    query, key, value = consecutive(attn.qkv_proj, queries, keys, keys)
    gate, up = consecutive(mlp.gate_up_proj, config.intermediate_size, config.intermediate_size)
    return pre_norm_block(
        layer,
        attention(
            layer,
            Projections(query, key, value, linear(attn.o_proj)),
            window=config.sliding_window,
        ),
        Mlp(ff1=gate, up=up, ff2=linear(mlp.down_proj)),
    )

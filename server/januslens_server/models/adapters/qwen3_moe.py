"""Qwen3-MoE: Qwen3's attention, a mixture of gated experts in some or all layers.

Distinct points:
- layers in `mlp_only_layers`, or off the `decoder_sparse_step`, have an ordinary gated MLP;
- the router's weights add up to 1 only if `norm_topk_prob`;
- `sliding_window` holds for every layer if `use_sliding_window`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    gated_mlp,
    llama_like,
    pre_norm_block,
)
from januslens_server.models.adapters.mixture import gated_experts, with_experts
from januslens_server.models.adapters.parts import rms_head_map
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Qwen3MoeForCausalLM`."""
    config: Any = model.config
    whole = llama_like(model, _block)
    return with_experts(whole, config.num_experts, config.moe_intermediate_size)


def _block(layer: Layer) -> Block:
    attn, mlp = layer.module.self_attn, layer.module.mlp
    window = getattr(attn, "sliding_window", None)
    normed = replace(
        attention(layer, window=window),
        query_map=rms_head_map(attn.q_norm),
        key_map=rms_head_map(attn.k_norm),
    )
    mixed = hasattr(mlp, "experts")
    return pre_norm_block(layer, normed, gated_experts(mlp) if mixed else gated_mlp(mlp))

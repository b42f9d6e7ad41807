"""OLMoE: a mixture of gated experts for every MLP, queries and keys normed over all heads.

Distinct points:
- the RMSNorm of queries and keys spans all heads; `clip_qkv` clips after it;
- values are clipped in place, in the memory of the linear map's own result;
- the router's weights add up to 1 only if `norm_topk_prob`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.adapters.mixture import gated_experts, with_experts
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map an `OlmoeForCausalLM`."""
    config: Any = model.config
    whole = llama_like(model, _block)
    return with_experts(whole, config.num_experts, config.intermediate_size)


def _block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    clip: float | None = layer.config.clip_qkv
    plain = attention(layer)
    normed = replace(
        plain,
        value=replace(plain.value, overwritten=clip is not None),
        value_clip=clip,
        query_map=_head_map(attn.q_norm, attn.head_dim, clip),
        key_map=_head_map(attn.k_norm, attn.head_dim, clip),
    )
    return pre_norm_block(layer, normed, gated_experts(layer.module.mlp))


def _head_map(norm: Any, d_head: int, clip: float | None) -> HeadMap:
    weight = norm.weight.detach().float().unflatten(0, (-1, d_head))
    spanning = HeadNorm(weight, norm.variance_epsilon, spans_heads=True)
    return HeadMap(norm=spanning, clip_after=clip)

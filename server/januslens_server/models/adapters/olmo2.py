"""OLMo 2: Llama's sublayers without pre-norms, each with a norm behind it.

Distinct points:
- attention and MLP read the residual itself; what they give is normed before it is added;
- queries and keys pass an RMSNorm whose denominator spans all heads, before they turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    llama_like,
    post_norm_block,
)
from januslens_server.models.adapters.parts import rms_norm
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map an `Olmo2ForCausalLM`."""
    return llama_like(model, _block)


def _block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    normed = replace(
        attention(layer),
        query_map=_head_map(attn.q_norm, attn.head_dim),
        key_map=_head_map(attn.k_norm, attn.head_dim),
    )
    return post_norm_block(layer, normed, rms_norm, pre_norms=False)


def _head_map(module: Any, d_head: int) -> HeadMap:
    norm = rms_norm(module)
    return HeadMap(
        norm=HeadNorm(norm.weight.unflatten(0, (-1, d_head)), norm.eps, spans_heads=True)
    )

"""OLMo 2: Llama's sublayers without pre-norms, each with a norm behind it.

Distinct points:
- attention and MLP read the residual itself; what they give is normed before it is added;
- queries and keys pass an RMSNorm whose denominator spans all heads, before they turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.models.adapters.llama_like import Layer, attention, gated_mlp, llama_like
from januslens_server.models.adapters.parts import finished, lens, rms_norm
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map an `Olmo2ForCausalLM`."""
    decoder: Any = model.model
    return llama_like(model, _block, lens(model, rms_norm(decoder.norm)))


def _block(layer: Layer) -> Block:
    module = layer.module
    attn = module.self_attn
    normed = replace(
        attention(layer),
        query_map=_head_map(attn.q_norm, attn.head_dim),
        key_map=_head_map(attn.k_norm, attn.head_dim),
    )
    after_attention, after_mlp = (
        module.post_attention_layernorm,
        module.post_feedforward_layernorm,
    )
    return Block(
        module=module,
        attention=finished(normed, after_attention, rms_norm(after_attention)),
        mlp=finished(gated_mlp(module.mlp), after_mlp, rms_norm(after_mlp)),
        residual_mid=Tap(module.mlp, End.INPUT),
        attention_prenorm=False,
        mlp_prenorm=False,
    )


def _head_map(module: Any, d_head: int) -> HeadMap:
    norm = rms_norm(module)
    return HeadMap(
        norm=HeadNorm(norm.weight.unflatten(0, (-1, d_head)), norm.eps, spans_heads=True)
    )

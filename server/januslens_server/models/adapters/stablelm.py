"""StableLM: Llama's sublayers under LayerNorms, partial rotary positions.

Distinct points:
- the first `partial_rotary_factor` of a head's dimensions turn, in pairs half that width apart;
- with `qk_layernorm` every head has a LayerNorm of its own for its queries and keys;
- with `use_parallel_residual` attention and MLP are parallel on one norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    gated_mlp,
    llama_like,
    parallel_block,
    pre_norm_block,
)
from januslens_server.models.adapters.parts import layer_norm, lens
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `StableLmForCausalLM`."""
    decoder: Any = model.model
    return llama_like(model, _block, lens(model, layer_norm(decoder.norm)))


def _block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    rotary = attention(layer)
    if layer.config.qk_layernorm:
        rotary = replace(
            rotary, query_map=_head_map(attn.q_layernorm), key_map=_head_map(attn.k_layernorm)
        )
    if layer.config.use_parallel_residual:
        return parallel_block(layer, rotary, gated_mlp(layer.module.mlp))
    return pre_norm_block(layer, rotary)


def _head_map(module: Any) -> HeadMap:
    norms = [layer_norm(norm) for norm in module.norms]
    weight = torch.stack([norm.weight for norm in norms])
    return HeadMap(norm=HeadNorm(weight, norms[0].eps, centred=True))

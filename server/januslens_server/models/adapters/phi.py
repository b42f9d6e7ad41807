"""Phi-1 to Phi-2: attention and MLP in parallel on one LayerNorm, partial rotary positions.

Distinct points:
- no residual between attention and MLP: the block adds both at once;
- the first `partial_rotary_factor` of a head's dimensions turn, in pairs half that width apart;
- with `qk_layernorm` each head's queries and keys pass a LayerNorm, the same for all heads;
- every linear map has a bias, the head too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.models.adapters.llama_like import (
    Layer,
    Projections,
    attention,
    llama_like,
    parallel_block,
)
from januslens_server.models.adapters.parts import layer_norm, lens, linear
from januslens_server.models.views import Block, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `PhiForCausalLM`."""
    decoder: Any = model.model
    return llama_like(model, _block, lens(model, layer_norm(decoder.final_layernorm)))


def _block(layer: Layer) -> Block:
    attn, mlp = layer.module.self_attn, layer.module.mlp
    projections = Projections(
        linear(attn.q_proj), linear(attn.k_proj), linear(attn.v_proj), linear(attn.dense)
    )
    rotary = attention(layer, projections)
    if layer.config.qk_layernorm:
        rotary = replace(
            rotary, query_map=_head_map(attn.q_layernorm), key_map=_head_map(attn.k_layernorm)
        )
    return parallel_block(layer, rotary, Mlp(ff1=linear(mlp.fc1), ff2=linear(mlp.fc2)))


def _head_map(module: Any) -> HeadMap:
    norm = layer_norm(module)
    return HeadMap(norm=HeadNorm(norm.weight, norm.eps, centred=True, bias=norm.bias))

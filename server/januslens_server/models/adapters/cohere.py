"""Cohere (Command R): attention and MLP in parallel on one bias-free LayerNorm.

Distinct points:
- no residual between attention and MLP: the block adds both at once;
- rotary pairs are neighbours;
- with `use_qk_norm` every head has a LayerNorm of its own for its queries and keys;
- logits are multiplied by `logit_scale`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.lens.norm import Norm
from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    gated_mlp,
    llama_like,
    parallel_block,
)
from januslens_server.models.adapters.parts import lens
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `CohereForCausalLM`."""
    decoder: Any = model.model
    norm = decoder.norm
    final_norm = Norm(norm.weight.detach().float(), None, norm.variance_epsilon, centred=True)
    head = lens(model, final_norm, logit_scale=model.config.logit_scale)
    return llama_like(model, _block, head, interleaved=True)


def _block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    rotary = attention(layer)
    if layer.config.use_qk_norm:
        rotary = replace(rotary, query_map=_head_map(attn.q_norm), key_map=_head_map(attn.k_norm))
    return parallel_block(layer, rotary, gated_mlp(layer.module.mlp))


def _head_map(module: Any) -> HeadMap:
    weight = module.weight.detach().float()
    return HeadMap(norm=HeadNorm(weight, module.variance_epsilon, centred=True))

"""OLMo: Llama's block on LayerNorms without learned numbers, optionally clipped projections.

Distinct points:
- norms centre and scale and nothing else;
- `clip_qkv` clips queries, keys and values in place, in the memory of the maps' own results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.graph.head_map import HeadMap
from januslens_server.lens.norm import Norm
from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.adapters.parts import lens
from januslens_server.models.views import Block, ModelView

# Stands in the norm's code, not in its configuration.
EPSILON = 1e-5


def view(model: PreTrainedModel) -> ModelView:
    """Map an `OlmoForCausalLM`."""
    embedding: Any = model.get_input_embeddings()
    ones = torch.ones(embedding.weight.shape[1], device=embedding.weight.device)
    return llama_like(model, _block, lens(model, Norm(ones, None, EPSILON, centred=True)))


def _block(layer: Layer) -> Block:
    clip: float | None = layer.config.clip_qkv
    plain = attention(layer)
    if clip is None:
        return pre_norm_block(layer, plain)
    clipped = replace(
        plain,
        query=replace(plain.query, overwritten=True),
        key=replace(plain.key, overwritten=True),
        value=replace(plain.value, overwritten=True),
        query_map=HeadMap(clip=clip),
        key_map=HeadMap(clip=clip),
        value_clip=clip,
    )
    return pre_norm_block(layer, clipped)

"""Gemma 3, its text model: Gemma 2's sandwich with query and key norms and two rotations.

Distinct points:
- queries and keys pass Gemma's RMSNorm over each head before they turn;
- sliding layers turn with a local rotation, full layers with a global one;
- attention scores have no soft-cap, whatever the configuration says; the logits may have one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.models.adapters.gemma import (
    gemma_head_map,
    gemma_norm,
    refuse_bidirectional,
)
from januslens_server.models.adapters.gemma2 import sandwich_block
from januslens_server.models.adapters.llama_like import Layer, attention, llama_like
from januslens_server.models.adapters.parts import lens, rotation
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Gemma3ForCausalLM`. Raises `ModelFailed` for bidirectional attention."""
    config: Any = model.config
    refuse_bidirectional(config)
    decoder: Any = model.model
    rotations = {kind: rotation(decoder, layer_type=kind) for kind in set(config.layer_types)}

    def block(layer: Layer) -> Block:
        attn = layer.module.self_attn
        normed = replace(
            attention(layer, window=layer.window),
            rotation=rotations[config.layer_types[layer.number]],
            query_map=gemma_head_map(attn.q_norm),
            key_map=gemma_head_map(attn.k_norm),
        )
        return sandwich_block(layer, normed)

    soft_cap = config.final_logit_softcapping
    return llama_like(model, block, lens(model, gemma_norm(decoder.norm), soft_cap=soft_cap))

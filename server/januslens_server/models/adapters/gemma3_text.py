"""Gemma 3: Gemma 2's sandwich with query and key norms and two rotations.

Distinct points:
- the larger models come with a vision tower, which text alone does not pass through;
- queries and keys pass Gemma's RMSNorm over each head before they turn;
- sliding layers turn with a local rotation, full layers with a global one;
- attention scores have no soft-cap, whatever the configuration says; the logits may have one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.lens.head import LensHead
from januslens_server.models.adapters.gemma import gemma_head_map, gemma_norm, refuse_bidirectional
from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    llama_like,
    post_norm_block,
)
from januslens_server.models.adapters.parts import lens, rotation
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Gemma3ForCausalLM`. Raises `ModelFailed` for bidirectional attention."""
    decoder: Any = model.model
    head = lens(model, gemma_norm(decoder.norm), soft_cap=decoder.config.final_logit_softcapping)
    return _view(model, decoder, head)


def view_with_vision(model: PreTrainedModel) -> ModelView:
    """Map a `Gemma3ForConditionalGeneration`, which caps no logits. Raises as `view` does."""
    whole: Any = model.model
    return _view(model, whole.language_model, lens(model, gemma_norm(whole.language_model.norm)))


def _view(model: PreTrainedModel, decoder: Any, head: LensHead) -> ModelView:
    config = decoder.config
    refuse_bidirectional(config)
    rotations = {kind: rotation(decoder, layer_type=kind) for kind in set(config.layer_types)}

    def block(layer: Layer) -> Block:
        attn = layer.module.self_attn
        normed = replace(
            attention(layer, window=layer.window),
            rotation=rotations[config.layer_types[layer.number]],
            query_map=gemma_head_map(attn.q_norm),
            key_map=gemma_head_map(attn.k_norm),
        )
        return post_norm_block(layer, normed, gemma_norm, pre_norms=True)

    return llama_like(model, block, head, decoder=decoder)

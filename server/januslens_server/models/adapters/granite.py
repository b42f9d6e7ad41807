"""Granite: Llama's block with multipliers in four places.

Distinct points:
- embeddings are multiplied by `embedding_multiplier` before the first block;
- what a sublayer gives is multiplied by `residual_multiplier` before it is added;
- scores are multiplied by `attention_multiplier` instead of 1 / sqrt(d_head);
- logits are divided by `logits_scaling`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.graph.weights import Finish
from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    gated_mlp,
    llama_like,
    pre_norm_block,
)
from januslens_server.models.adapters.parts import lens, rms_norm
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `GraniteForCausalLM`."""
    config: Any = model.config
    decoder: Any = model.model
    head = lens(model, rms_norm(decoder.norm), logit_scale=1 / config.logits_scaling)
    return llama_like(model, _block, head)


def _block(layer: Layer) -> Block:
    finish = Finish(multiplier=layer.config.residual_multiplier)
    return pre_norm_block(
        layer,
        replace(attention(layer), finish=finish),
        replace(gated_mlp(layer.module.mlp), finish=finish),
    )

"""Gemma 2: Gemma's block with a norm before and after each sublayer, and soft-caps.

Distinct points:
- post-norms stand between each sublayer and the residual;
- attention scores and logits are soft-capped;
- SDPA knows no soft-cap of scores, so it is turned off where transformers lets it run;
- scores are scaled by `query_pre_attn_scalar`, not by d_head;
- sliding and full layers alternate, as `layer_types` says.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.models.adapters.gemma import gemma_norm, refuse_bidirectional
from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    llama_like,
    post_norm_block,
)
from januslens_server.models.adapters.parts import lens, run_eagerly
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Gemma2ForCausalLM`. Raises `ModelFailed` for bidirectional attention."""
    config: Any = model.config
    refuse_bidirectional(config)
    if config.attn_logit_softcapping is not None:
        run_eagerly(model)
    decoder: Any = model.model
    head = lens(model, gemma_norm(decoder.norm), soft_cap=config.final_logit_softcapping)
    return llama_like(model, _block, head)


def _block(layer: Layer) -> Block:
    soft_cap = layer.config.attn_logit_softcapping
    attending = attention(layer, window=layer.window, soft_cap=soft_cap)
    return post_norm_block(layer, attending, gemma_norm, pre_norms=True)

"""Gemma 2: Gemma's block with a norm before and after each sublayer, and soft-caps.

Distinct points:
- post-norms stand between each sublayer and the residual;
- attention scores and logits are soft-capped;
- scores are scaled by `query_pre_attn_scalar`, not by d_head;
- sliding and full layers alternate, as `layer_types` says.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.models.adapters.gemma import gemma_norm, refuse_bidirectional
from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    gated_mlp,
    llama_like,
)
from januslens_server.models.adapters.parts import finished, lens
from januslens_server.models.views import Attention, Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Gemma2ForCausalLM`. Raises `ModelFailed` for bidirectional attention."""
    config: Any = model.config
    refuse_bidirectional(config)
    decoder: Any = model.model
    head = lens(model, gemma_norm(decoder.norm), soft_cap=config.final_logit_softcapping)
    return llama_like(model, _block, head)


def sandwich_block(layer: Layer, attention: Attention) -> Block:
    """A norm before and a norm after each sublayer."""
    module = layer.module
    after_attention, after_mlp = (
        module.post_attention_layernorm,
        module.post_feedforward_layernorm,
    )
    return Block(
        module=module,
        attention=finished(attention, after_attention, gemma_norm(after_attention)),
        mlp=finished(gated_mlp(module.mlp), after_mlp, gemma_norm(after_mlp)),
        residual_mid=Tap(module.pre_feedforward_layernorm, End.INPUT),
    )


def _block(layer: Layer) -> Block:
    soft_cap = layer.config.attn_logit_softcapping
    return sandwich_block(layer, attention(layer, window=layer.window, soft_cap=soft_cap))

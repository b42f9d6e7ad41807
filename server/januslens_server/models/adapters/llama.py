"""Llama: pre-RMSNorm, rotary positions, grouped key-value heads, gated MLP.

Distinct points:
- pairs of a rotation are half a head apart; `rotary_emb` has the scaling of every RoPE variant;
- `d_head` is a setting of its own and need not be `d_model / n_heads`;
- biases of attention and MLP are off by default.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import (
    Layer,
    attention,
    llama_like,
    pre_norm_block,
)
from januslens_server.models.adapters.parts import lens, rms_norm
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `LlamaForCausalLM`."""
    decoder: Any = model.model
    return llama_like(model, _block, lens(model, rms_norm(decoder.norm)))


def _block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer))

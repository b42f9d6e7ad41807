"""Llama: pre-RMSNorm, rotary positions, grouped key-value heads, gated MLP.

Distinct points:
- pairs of a rotation are half a head apart; `rotary_emb` has the scaling of every RoPE variant;
- `d_head` is a setting of its own and need not be `d_model / n_heads`;
- biases of attention and MLP are off by default.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `LlamaForCausalLM`."""
    return llama_like(model, _block)


def _block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer))

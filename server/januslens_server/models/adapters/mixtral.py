"""Mixtral: Mistral's attention, a mixture of gated experts for every MLP.

Distinct points:
- two experts a position by default; the router's weights are made to add up to 1.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.adapters.mixture import gated_experts, with_experts
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `MixtralForCausalLM`."""
    config: Any = model.config
    whole = llama_like(model, _block)
    return with_experts(whole, config.num_local_experts, config.intermediate_size)


def _block(layer: Layer) -> Block:
    attending = attention(layer, window=layer.config.sliding_window)
    return pre_norm_block(layer, attending, gated_experts(layer.module.mlp))

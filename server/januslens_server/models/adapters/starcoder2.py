"""StarCoder2: Llama's attention with biases, under LayerNorms, and GPT-2's MLP.

Distinct points:
- the MLP is not gated: `c_fc`, then `c_proj`;
- every linear map has a bias unless `use_bias` is off; the head has none;
- `sliding_window` holds for every layer.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.adapters.parts import layer_norm, lens, linear
from januslens_server.models.views import Block, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `Starcoder2ForCausalLM`."""
    decoder: Any = model.model
    return llama_like(model, _block, lens(model, layer_norm(decoder.norm)))


def _block(layer: Layer) -> Block:
    mlp = layer.module.mlp
    return pre_norm_block(
        layer,
        attention(layer, window=layer.config.sliding_window),
        Mlp(ff1=linear(mlp.c_fc), ff2=linear(mlp.c_proj)),
    )

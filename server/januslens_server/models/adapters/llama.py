"""Llama: pre-RMSNorm, rotary positions, grouped key-value heads, gated MLP.

Distinct points:
- pairs of a rotation are half a head apart; `rotary_emb` has the scaling of every RoPE variant;
- `d_head` is a setting of its own and need not be `d_model / n_heads`;
- biases of attention and MLP are off by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.capture import End, Rotation, Tap
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.lens.head import LensHead
from januslens_server.models.adapters.parts import linear, rms_norm
from januslens_server.models.views import Attention, Block, Mlp, ModelView
from januslens_server.results import ModelFacts


def view(model: PreTrainedModel) -> ModelView:
    """Map a `LlamaForCausalLM`."""
    config: Any = model.config
    decoder: Any = model.model
    head: Any = model.lm_head
    rotation = half_rotation(decoder.rotary_emb)
    lens = LensHead(rms_norm(decoder.norm), head.weight.detach().float())
    blocks = tuple(_block(module, config, rotation) for module in decoder.layers)
    facts = ModelFacts(
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_model=config.hidden_size,
        d_head=config.head_dim,
        d_mlp=config.intermediate_size,
        n_experts=0,
        vocab_size=head.weight.shape[0],
        max_positions=config.max_position_embeddings,
    )
    return ModelView(embedding=decoder.embed_tokens, blocks=blocks, lens=lens, facts=facts)


def half_rotation(rotary: Any) -> Callable[[int], Rotation]:
    """The model's own cosines and sines for a prompt of a given length."""

    def rotation(length: int) -> Rotation:
        device = rotary.inv_freq.device
        positions = torch.arange(length, device=device)[None]
        cos, sin = rotary(torch.empty(0, device=device), positions)
        return Rotation(cos[0], sin[0], interleaved=False)

    return rotation


def _block(module: Any, config: Any, rotation: Callable[[int], Rotation]) -> Block:
    attention = Attention(
        query=linear(module.self_attn.q_proj),
        key=linear(module.self_attn.k_proj),
        value=linear(module.self_attn.v_proj),
        output=linear(module.self_attn.o_proj),
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        scoring=Scoring(scale=module.self_attn.scaling),
        rotation=rotation,
    )
    mlp = Mlp(
        ff1=linear(module.mlp.gate_proj),
        up=linear(module.mlp.up_proj),
        ff2=linear(module.mlp.down_proj),
    )
    return Block(
        module=module,
        attention=attention,
        mlp=mlp,
        residual_mid=Tap(module.post_attention_layernorm, End.INPUT),
    )

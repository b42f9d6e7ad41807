"""MPT: ALiBi instead of positions, clipped queries, keys and values, no biases.

Distinct points:
- `Wqkv` holds all queries, then all keys, then all values, each clipped to `clip_qkv`;
- ALiBi is added to the scaled scores, whatever `attn_config.alibi` says;
- LayerNorms have no bias; the MLP's module adds the residual itself: its linear maps are observed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.graph.head_map import HeadMap
from januslens_server.models.adapters.parts import consecutive, facts, layer_norm, lens, linear
from januslens_server.models.views import Attention, Block, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map an `MptForCausalLM`."""
    config: Any = model.config
    decoder: Any = model.transformer

    def alibi(length: int) -> torch.Tensor:
        device = decoder.wte.weight.device
        biases: torch.Tensor = decoder.build_mpt_alibi_tensor(config.n_heads, length, device=device)
        return biases[:, 0]

    return ModelView(
        embedding=decoder.wte,
        blocks=tuple(
            _block(module, Scoring(scale=module.attn.softmax_scale, alibi=alibi))
            for module in decoder.blocks
        ),
        lens=lens(model, layer_norm(decoder.norm_f)),
        facts=facts(model, d_mlp=4 * config.d_model, max_positions=config.max_seq_len),
    )


def _block(module: Any, scoring: Scoring) -> Block:
    attn, mlp = module.attn, module.ffn
    query, key, value = consecutive(attn.Wqkv, *[attn.hidden_size] * 3)
    clip = attn.clip_qkv or None
    attention = Attention(
        query=query,
        key=key,
        value=value,
        output=linear(attn.out_proj),
        n_heads=attn.n_heads,
        n_kv_heads=attn.n_heads,
        scoring=scoring,
        query_map=HeadMap(clip=clip),
        key_map=HeadMap(clip=clip),
        value_clip=clip,
    )
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(mlp.up_proj), ff2=linear(mlp.down_proj)),
        residual_mid=Tap(module.norm_2, End.INPUT),
    )

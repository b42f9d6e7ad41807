"""GPT-J: attention and MLP in parallel on one LayerNorm, partial rotary positions.

Distinct points:
- no residual between attention and MLP: the block adds both at once;
- the first `rotary_dim` dimensions of a head turn, in neighbouring pairs, by a table that each
  attention has and from transformers 5.24 on the whole model;
- the head has a bias; projections of attention have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.capture import Rotation
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.models.adapters.parts import facts, layer_norm, lens, linear
from januslens_server.models.views import Attention, Block, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `GPTJForCausalLM`."""
    config: Any = model.config
    transformer: Any = model.transformer
    return ModelView(
        embedding=transformer.wte,
        blocks=tuple(_block(module, transformer, config) for module in transformer.h),
        lens=lens(model, layer_norm(transformer.ln_f)),
        facts=facts(
            model, d_mlp=config.n_inner or 4 * config.n_embd, max_positions=config.n_positions
        ),
    )


def _block(module: Any, transformer: Any, config: Any) -> Block:
    attention = Attention(
        query=linear(module.attn.q_proj),
        key=linear(module.attn.k_proj),
        value=linear(module.attn.v_proj),
        output=linear(module.attn.out_proj),
        n_heads=config.n_head,
        n_kv_heads=config.n_head,
        scoring=Scoring(scale=(config.n_embd // config.n_head) ** -0.5),
        rotation=_rotation(getattr(transformer, "rotary_emb", module.attn)),
    )
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(module.mlp.fc_in), ff2=linear(module.mlp.fc_out)),
        residual_mid=None,
    )


def _rotation(holder: Any) -> Callable[[int], Rotation]:
    def rotation(length: int) -> Rotation:
        sin, cos = holder.embed_positions[:length].chunk(2, dim=-1)
        return Rotation(
            torch.repeat_interleave(cos, 2, dim=-1),
            torch.repeat_interleave(sin, 2, dim=-1),
            interleaved=True,
        )

    return rotation

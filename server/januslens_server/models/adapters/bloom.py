"""BLOOM: ALiBi instead of positions, one fused projection, a norm after the embedding.

Distinct points:
- ALiBi is added to the scaled scores, in the model's own data type;
- `query_key_value` holds query, key and value head by head;
- the modules of attention and MLP add the residual themselves: their linear maps are observed;
- refused: `apply_residual_connection_post_layernorm`, where the residual is the normed vector
  and no longer the sum of what the blocks wrote, and `slow_but_exact` products in slices, which
  go past the linear modules.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.models.adapters.parts import by_head, facts, layer_norm, lens, linear
from januslens_server.models.views import Attention, Block, Mlp, ModelView

# BLOOM was trained on so many positions; ALiBi itself sets no limit.
TRAINED_POSITIONS = 2048


def view(model: PreTrainedModel) -> ModelView:
    """Map a `BloomForCausalLM`. Raises `ModelFailed` for the variants above."""
    config: Any = model.config
    _refuse(config)
    decoder: Any = model.transformer

    def alibi(length: int) -> torch.Tensor:
        weight = decoder.word_embeddings.weight
        seen = torch.ones(1, length, device=weight.device)
        biases: torch.Tensor = decoder.build_alibi_tensor(seen, config.n_head, weight.dtype)
        return biases[:, 0]

    return ModelView(
        embedding=decoder.word_embeddings,
        blocks=tuple(
            _block(module, Scoring(scale=module.self_attention.inv_norm_factor, alibi=alibi))
            for module in decoder.h
        ),
        lens=lens(model, layer_norm(decoder.ln_f)),
        facts=facts(
            model,
            d_mlp=4 * config.hidden_size,
            max_positions=getattr(config, "seq_length", TRAINED_POSITIONS),
        ),
    )


def _refuse(config: Any) -> None:
    if config.apply_residual_connection_post_layernorm:
        raise ModelFailed(
            "expected a BLOOM whose residual is the sum of what its blocks write, got "
            "apply_residual_connection_post_layernorm"
        )
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise ModelFailed(
            "expected a BLOOM with whole matrix products, got slow_but_exact; set it to false"
        )


def _block(module: Any, scoring: Scoring) -> Block:
    attn, mlp = module.self_attention, module.mlp
    query, key, value = by_head(attn.query_key_value, attn.num_heads, attn.head_dim)
    attention = Attention(
        query=query,
        key=key,
        value=value,
        output=linear(attn.dense),
        n_heads=attn.num_heads,
        n_kv_heads=attn.num_heads,
        scoring=scoring,
    )
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(mlp.dense_h_to_4h), ff2=linear(mlp.dense_4h_to_h)),
        residual_mid=Tap(module.post_attention_layernorm, End.INPUT),
    )

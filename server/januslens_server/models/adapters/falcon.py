"""Falcon: three layouts of attention, parallel or sequential blocks, rotary positions or ALiBi.

Distinct points:
- `query_key_value` holds, with `new_decoder_architecture`, each group's queries, key and value in
  turn; with `multi_query`, all queries and then one key and one value; else head by head;
- the MLP is parallel to attention, on one norm or two, unless `parallel_attn` is off;
- attention's result is added to the MLP's in place, so the latter is copied when it is read;
- ALiBi is rounded to bfloat16 and scaled with the scores;
- refused: ALiBi under eager attention, which in transformers adds it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from januslens_server.capture import End, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.models.adapters.parts import (
    by_head,
    consecutive,
    facts,
    layer_norm,
    lens,
    linear,
    rotation,
)
from januslens_server.models.views import Attention, Block, Linear, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `FalconForCausalLM`. Raises `ModelFailed` for ALiBi under eager attention."""
    config: Any = model.config
    if config.alibi and config._attn_implementation == "eager":  # noqa: SLF001 - no public reader
        raise ModelFailed("expected SDPA attention for a Falcon with ALiBi, got eager attention")
    decoder: Any = model.transformer
    return ModelView(
        embedding=decoder.word_embeddings,
        blocks=tuple(_block(module, config, decoder) for module in decoder.h),
        lens=lens(model, layer_norm(decoder.ln_f)),
        facts=facts(
            model,
            n_kv_heads=_n_kv_heads(config),
            d_mlp=config.ffn_hidden_size,
            max_positions=config.max_position_embeddings,
        ),
    )


def _n_kv_heads(config: Any) -> int:
    """The effective count: with `multi_query` one, whatever `num_kv_heads` says."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _projections(attn: Any, config: Any) -> tuple[Linear, ...]:
    d_head, n_heads, fused = attn.head_dim, attn.num_heads, attn.query_key_value
    if config.multi_query and not config.new_decoder_architecture:
        return consecutive(fused, n_heads * d_head, d_head, d_head)
    return by_head(fused, n_heads, d_head, group=n_heads // _n_kv_heads(config))


def _block(module: Any, config: Any, decoder: Any) -> Block:
    attn, mlp = module.self_attention, module.mlp
    scale = attn.inv_norm_factor
    query, key, value = _projections(attn, config)
    attention = Attention(
        query=query,
        key=key,
        value=value,
        output=linear(attn.dense),
        n_heads=attn.num_heads,
        n_kv_heads=_n_kv_heads(config),
        scoring=Scoring(scale, alibi=_alibi(decoder, attn, scale) if config.alibi else None),
        rotation=None if config.alibi else rotation(decoder),
    )
    parallel = config.new_decoder_architecture or config.parallel_attn
    down = linear(mlp.dense_4h_to_h)
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(mlp.dense_h_to_4h), ff2=replace(down, overwritten=parallel)),
        residual_mid=None if parallel else Tap(module.post_attention_layernorm, End.INPUT),
    )


def _alibi(decoder: Any, attn: Any, scale: float) -> Callable[[int], torch.Tensor]:
    def of_length(length: int) -> torch.Tensor:
        weight = decoder.word_embeddings.weight
        seen = torch.ones(1, length, device=weight.device, dtype=torch.long)
        return build_alibi_tensor(seen, attn.num_heads, weight.dtype)[:, 0] * scale

    return of_length

"""BLOOM, MPT and Falcon: families with ALiBi (Press et al., ICLR 2022) as position bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from januslens_server.capture import End, Tap
from januslens_server.errors import ModelFailed, WrongResults
from januslens_server.graph.weights import HeadMap, Scoring
from januslens_server.models.adapters.modules import (
    by_head,
    consecutive,
    facts,
    layer_norm,
    lens,
    linear,
    rotation,
)
from januslens_server.models.matrices import Linear
from januslens_server.models.views import Attention, Block, Mlp, ModelView

# The length that BLOOM was trained with. ALiBi itself sets no limit.
BLOOM_TRAINED_POSITIONS = 2048
# MPT computes the biases of its whole context in every pass: 1 GiB of float32.
MPT_BIASES = 2**28


def bloom(model: PreTrainedModel) -> ModelView:
    """BLOOM: ALiBi instead of positions, one fused projection, a norm after the embedding.

    Distinct points:
    - ALiBi is added to the scaled scores, in the model's own data type;
    - `query_key_value` holds query, key and value head by head;
    - the modules of attention and MLP add the residual themselves, so their linear maps are
      captured instead;
    - refused: `apply_residual_connection_post_layernorm`, where the residual is the normed vector
      instead of the sum of the blocks' results, and `slow_but_exact`, which multiplies slices
      without calling the linear modules.

    Raises `ModelFailed` for the refused variants.
    """
    config: Any = model.config
    _refuse_bloom_variants(config)
    decoder: Any = model.transformer

    def alibi(length: int) -> torch.Tensor:
        weight = decoder.word_embeddings.weight
        seen = torch.ones(1, length, device=weight.device)
        biases: torch.Tensor = decoder.build_alibi_tensor(seen, config.n_head, weight.dtype)
        return biases[:, 0]

    return ModelView(
        embedding=decoder.word_embeddings,
        blocks=tuple(
            _bloom_block(module, Scoring(scale=module.self_attention.inv_norm_factor, alibi=alibi))
            for module in decoder.h
        ),
        lens=lens(model, layer_norm(decoder.ln_f)),
        facts=facts(
            model,
            d_mlp=4 * config.hidden_size,
            max_positions=getattr(config, "seq_length", BLOOM_TRAINED_POSITIONS),
        ),
    )


def _refuse_bloom_variants(config: Any) -> None:
    if config.apply_residual_connection_post_layernorm:
        raise ModelFailed(
            "apply_residual_connection_post_layernorm is true: expected false, with a residual "
            "stream that is the sum of the blocks' outputs"
        )
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise ModelFailed("slow_but_exact is true: expected false, with whole matrix products")


def _bloom_block(module: Any, scoring: Scoring) -> Block:
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


def mpt(model: PreTrainedModel) -> ModelView:
    """MPT: ALiBi instead of positions, clipped queries, keys and values, no biases.

    Distinct points:
    - `Wqkv` holds all queries, then all keys, then all values, each clipped to `clip_qkv`;
    - ALiBi is added to the scaled scores, even if `attn_config.alibi` is off;
    - LayerNorms have no bias;
    - the MLP's module adds the residual itself, so its linear maps are captured instead.
    """
    config: Any = model.config
    decoder: Any = model.transformer
    if config.n_heads * config.max_seq_len > MPT_BIASES:
        raise ModelFailed(
            f"max_seq_len {config.max_seq_len} is too large: expected at most "
            f"{MPT_BIASES // config.n_heads}"
        )

    def alibi(length: int) -> torch.Tensor:
        device = decoder.wte.weight.device
        biases: torch.Tensor = decoder.build_mpt_alibi_tensor(config.n_heads, length, device=device)
        return biases[:, 0]

    return ModelView(
        embedding=decoder.wte,
        blocks=tuple(
            _mpt_block(module, Scoring(scale=module.attn.softmax_scale, alibi=alibi))
            for module in decoder.blocks
        ),
        lens=lens(model, layer_norm(decoder.norm_f)),
        facts=facts(model, d_mlp=4 * config.d_model, max_positions=config.max_seq_len),
    )


def _mpt_block(module: Any, scoring: Scoring) -> Block:
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
        value_map=HeadMap(clip=clip),
    )
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(mlp.up_proj), ff2=linear(mlp.down_proj)),
        residual_mid=Tap(module.norm_2, End.INPUT),
    )


def falcon(model: PreTrainedModel) -> ModelView:
    """Falcon: three layouts of attention, parallel or sequential blocks, rotary positions or ALiBi.

    Distinct points:
    - `query_key_value` holds, with `new_decoder_architecture`, each group's queries, key and value
      in turn; with `multi_query`, all queries, then one key and one value; otherwise query, key and
      value of each head in turn;
    - attention and MLP are parallel, with one norm or two, unless `parallel_attn` is off;
    - the model adds attention's result to the MLP's in place, so the MLP's is copied at capture;
    - ALiBi is rounded to bfloat16 and scaled like the scores;
    - refused: ALiBi with eager attention, where transformers adds it twice.

    Raises `WrongResults` for ALiBi under eager attention.
    """
    config: Any = model.config
    if config.alibi and config._attn_implementation == "eager":  # noqa: SLF001 - no public reader
        raise WrongResults("the attention of a Falcon with ALiBi is eager: expected SDPA")
    decoder: Any = model.transformer
    return ModelView(
        embedding=decoder.word_embeddings,
        blocks=tuple(_falcon_block(module, config, decoder) for module in decoder.h),
        lens=lens(model, layer_norm(decoder.ln_f)),
        facts=facts(
            model,
            n_kv_heads=_falcon_n_kv_heads(config),
            d_mlp=config.ffn_hidden_size,
            max_positions=config.max_position_embeddings,
        ),
    )


def _falcon_n_kv_heads(config: Any) -> int:
    """Number of key-value heads: 1 with `multi_query`, even if `num_kv_heads` differs."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _falcon_projections(attn: Any, config: Any) -> tuple[Linear, ...]:
    d_head, n_heads, fused = attn.head_dim, attn.num_heads, attn.query_key_value
    if config.multi_query and not config.new_decoder_architecture:
        return consecutive(fused, n_heads * d_head, d_head, d_head)
    return by_head(fused, n_heads, d_head, group=n_heads // _falcon_n_kv_heads(config))


def _falcon_block(module: Any, config: Any, decoder: Any) -> Block:
    attn, mlp = module.self_attention, module.mlp
    scale = attn.inv_norm_factor
    query, key, value = _falcon_projections(attn, config)
    attention = Attention(
        query=query,
        key=key,
        value=value,
        output=linear(attn.dense),
        n_heads=attn.num_heads,
        n_kv_heads=_falcon_n_kv_heads(config),
        scoring=Scoring(scale, alibi=_falcon_alibi(decoder, attn, scale) if config.alibi else None),
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


def _falcon_alibi(decoder: Any, attn: Any, scale: float) -> Callable[[int], torch.Tensor]:
    def of_length(length: int) -> torch.Tensor:
        weight = decoder.word_embeddings.weight
        seen = torch.ones(1, length, device=weight.device, dtype=torch.long)
        return build_alibi_tensor(seen, attn.num_heads, weight.dtype)[:, 0] * scale

    return of_length

"""Mixtures of experts: Mixtral, Qwen3-MoE, OLMoE and GPT-OSS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.capture import Rotation
from januslens_server.graph.weights import HeadMap
from januslens_server.models.adapters.llama import (
    Layer,
    attention,
    gated_mlp,
    llama_like,
    pre_norm_block,
)
from januslens_server.models.adapters.modules import norm_tap, rms_head_map, spanning_head_map
from januslens_server.models.adapters.observed_mlp import stacked_experts
from januslens_server.models.experts import Experts
from januslens_server.models.views import Block, ModelView


def _experts(mlp: Any) -> Experts:
    return stacked_experts(mlp.experts, mlp, mlp.gate)


def with_experts(view: ModelView, n_experts: int, d_mlp: int) -> ModelView:
    """Set the number of experts and their width in a view."""
    return replace(view, facts=replace(view.facts, n_experts=n_experts, d_mlp=d_mlp))


def mixtral(model: PreTrainedModel) -> ModelView:
    """Mixtral: Mistral's attention, a mixture of gated experts for every MLP.

    Distinct points:
    - two experts per position by default; the router's weights add up to 1.
    """
    config: Any = model.config
    whole = llama_like(model, _mixtral_block)
    return with_experts(whole, config.num_local_experts, config.intermediate_size)


def _mixtral_block(layer: Layer) -> Block:
    attending = attention(layer, window=layer.config.sliding_window)
    return pre_norm_block(layer, attending, _experts(layer.module.mlp))


def qwen3_moe(model: PreTrainedModel) -> ModelView:
    """Qwen3-MoE: Qwen3's attention, a mixture of gated experts in some or all layers.

    Distinct points:
    - layers in `mlp_only_layers`, or not on the `decoder_sparse_step`, have a dense gated MLP;
    - the router's weights add up to 1 only if `norm_topk_prob`;
    - `sliding_window` applies to every layer if `use_sliding_window`.
    """
    config: Any = model.config
    whole = llama_like(model, _qwen3_moe_block)
    return with_experts(whole, config.num_experts, config.moe_intermediate_size)


def _qwen3_moe_block(layer: Layer) -> Block:
    attn, mlp = layer.module.self_attn, layer.module.mlp
    window = getattr(attn, "sliding_window", None)
    normed = replace(
        attention(layer, window=window),
        query_map=rms_head_map(attn.q_norm),
        key_map=rms_head_map(attn.k_norm),
        query_norm=norm_tap(attn.q_norm),
        key_norm=norm_tap(attn.k_norm),
    )
    mixed = hasattr(mlp, "experts")
    return pre_norm_block(layer, normed, _experts(mlp) if mixed else gated_mlp(mlp))


def olmoe(model: PreTrainedModel) -> ModelView:
    """OLMoE: a mixture of gated experts for every MLP, queries and keys normed over all heads.

    Distinct points:
    - the RMSNorm of queries and keys spans all heads; `clip_qkv` clips after it;
    - values are clipped in place, in the output of their linear map;
    - the router's weights add up to 1 only if `norm_topk_prob`.
    """
    config: Any = model.config
    whole = llama_like(model, _olmoe_block)
    return with_experts(whole, config.num_experts, config.intermediate_size)


def _olmoe_block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    clip: float | None = layer.config.clip_qkv
    plain = attention(layer)
    normed = replace(
        plain,
        value=replace(plain.value, overwritten=clip is not None),
        value_map=HeadMap(clip=clip),
        query_map=spanning_head_map(attn.q_norm, attn.head_dim, clip),
        key_map=spanning_head_map(attn.k_norm, attn.head_dim, clip),
        query_norm=norm_tap(attn.q_norm),
        key_norm=norm_tap(attn.k_norm),
    )
    return pre_norm_block(layer, normed, _experts(layer.module.mlp))


def gpt_oss(model: PreTrainedModel) -> ModelView:
    """GPT-OSS: attention sinks, alternating windows, experts with biases and a clamped activation.

    Distinct points:
    - each head has a sink, a score that takes probability but has no value;
    - the rotary embedding returns each angle once, for pairs half a head apart;
    - `layer_types` determines which layers use the sliding window;
    - gate and up alternate in `gate_up_proj`, which is stored as rows; all expert maps have biases;
    - neurons are `(up + 1) * gate * sigmoid(alpha * gate)`, with gate and up clamped first.
    """
    config: Any = model.config
    whole = llama_like(model, _gpt_oss_block)
    return with_experts(whole, config.num_local_experts, config.intermediate_size)


def _gpt_oss_block(layer: Layer) -> Block:
    plain, mlp = attention(layer, window=layer.window), layer.module.mlp
    sinks = layer.module.self_attn.sinks.detach().float()
    with_sinks = replace(
        plain,
        scoring=replace(plain.scoring, sinks=sinks),
        rotation=partial(_gpt_oss_both_halves, layer.rotation),
    )
    return pre_norm_block(layer, with_sinks, stacked_experts(mlp.experts, mlp, mlp.router))


def _gpt_oss_both_halves(rotation: Callable[[int], Rotation], length: int) -> Rotation:
    """Repeat each angle for both dimensions of its pair."""
    once = rotation(length)
    cos, sin = (torch.cat([angles, angles], dim=-1) for angles in (once.cos, once.sin))
    return Rotation(cos, sin, interleaved=False)

"""Cohere, Phi and StableLM: Llama-like families with parallel attention and MLP.

A parallel block adds both results to the residual at once: there is no residual between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.graph.weights import HeadMap, HeadNorm
from januslens_server.lens.norm import Norm
from januslens_server.models.adapters.llama import (
    Layer,
    Projections,
    attention,
    gated_mlp,
    llama_like,
    parallel_block,
    pre_norm_block,
)
from januslens_server.models.adapters.modules import layer_norm, lens, linear, norm_tap
from januslens_server.models.views import Block, Mlp, ModelView


def cohere(model: PreTrainedModel) -> ModelView:
    """Cohere (Command R): attention and MLP in parallel on one bias-free LayerNorm.

    Distinct points:
    - rotary pairs are neighbouring dimensions;
    - with `use_qk_norm` every head has its own LayerNorm for queries and keys;
    - logits are multiplied by `logit_scale`.
    """
    decoder: Any = model.model
    norm = decoder.norm
    final_norm = Norm(norm.weight.detach().float(), None, norm.variance_epsilon, centred=True)
    head = lens(model, final_norm, logit_scale=model.config.logit_scale)
    return llama_like(model, _cohere_block, head, interleaved=True)


def _cohere_block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    rotary = attention(layer)
    if layer.config.use_qk_norm:
        rotary = replace(
            rotary,
            query_map=_cohere_head_map(attn.q_norm),
            key_map=_cohere_head_map(attn.k_norm),
            query_norm=norm_tap(attn.q_norm),
            key_norm=norm_tap(attn.k_norm),
        )
    return parallel_block(layer, rotary, gated_mlp(layer.module.mlp))


def _cohere_head_map(module: Any) -> HeadMap:
    weight = module.weight.detach().float()
    return HeadMap(norm=HeadNorm(weight, module.variance_epsilon, centred=True))


def phi(model: PreTrainedModel) -> ModelView:
    """Phi-1 to Phi-2: attention and MLP in parallel on one LayerNorm, partial rotary positions.

    Distinct points:
    - the first `partial_rotary_factor` of a head's dimensions are rotated, in pairs half that width
      apart;
    - with `qk_layernorm` queries and keys pass a LayerNorm that all heads share;
    - every linear map has a bias, including the output head.
    """
    decoder: Any = model.model
    return llama_like(model, _phi_block, lens(model, layer_norm(decoder.final_layernorm)))


def _phi_block(layer: Layer) -> Block:
    attn, mlp = layer.module.self_attn, layer.module.mlp
    projections = Projections(
        linear(attn.q_proj), linear(attn.k_proj), linear(attn.v_proj), linear(attn.dense)
    )
    rotary = attention(layer, projections)
    if layer.config.qk_layernorm:
        rotary = replace(
            rotary,
            query_map=_phi_head_map(attn.q_layernorm),
            key_map=_phi_head_map(attn.k_layernorm),
            query_norm=norm_tap(attn.q_layernorm, heads_first=True),
            key_norm=norm_tap(attn.k_layernorm, heads_first=True),
        )
    return parallel_block(layer, rotary, Mlp(ff1=linear(mlp.fc1), ff2=linear(mlp.fc2)))


def _phi_head_map(module: Any) -> HeadMap:
    norm = layer_norm(module)
    return HeadMap(norm=HeadNorm(norm.weight, norm.eps, centred=True, bias=norm.bias))


def stablelm(model: PreTrainedModel) -> ModelView:
    """StableLM: Llama's sublayers with LayerNorms and partial rotary positions.

    Distinct points:
    - the first `partial_rotary_factor` of a head's dimensions are rotated, in pairs half that width
      apart;
    - with `qk_layernorm` every head has its own LayerNorm for queries and keys;
    - with `use_parallel_residual` attention and MLP are parallel and read one norm.
    """
    decoder: Any = model.model
    return llama_like(model, _stablelm_block, lens(model, layer_norm(decoder.norm)))


def _stablelm_block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    rotary = attention(layer)
    if layer.config.qk_layernorm:
        rotary = replace(
            rotary,
            query_map=_stablelm_head_map(attn.q_layernorm),
            key_map=_stablelm_head_map(attn.k_layernorm),
            query_norm=norm_tap(attn.q_layernorm, heads_first=True),
            key_norm=norm_tap(attn.k_layernorm, heads_first=True),
        )
    if layer.config.use_parallel_residual:
        return parallel_block(layer, rotary, gated_mlp(layer.module.mlp))
    return pre_norm_block(layer, rotary)


def _stablelm_head_map(module: Any) -> HeadMap:
    norms = [layer_norm(norm) for norm in module.norms]
    weight = torch.stack([norm.weight for norm in norms])
    return HeadMap(norm=HeadNorm(weight, norms[0].eps, centred=True))

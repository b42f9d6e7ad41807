"""GPT-OSS: attention sinks, alternating windows, experts with biases and a clamped activation.

Distinct points:
- each head has a sink, a score that takes probability without giving a value;
- the rotary embedding gives each angle once, for pairs half a head apart;
- `layer_types` says which layers attend through the sliding window;
- gate and up alternate in `gate_up_proj`, which is stored as rows; all expert maps have biases;
- neurons are `(up + 1) * gate * sigmoid(alpha * gate)`, both clamped before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.capture import Rotation
from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.adapters.mixture import Activation, with_experts
from januslens_server.models.experts import Experts
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `GptOssForCausalLM`."""
    config: Any = model.config
    whole = llama_like(model, _block)
    return with_experts(whole, config.num_local_experts, config.intermediate_size)


def _block(layer: Layer) -> Block:
    plain = attention(layer, window=layer.window)
    sinks = layer.module.self_attn.sinks.detach().float()
    with_sinks = replace(
        plain,
        scoring=replace(plain.scoring, sinks=sinks),
        rotation=partial(_both_halves, layer.rotation),
    )
    return pre_norm_block(layer, with_sinks, _experts(layer.module.mlp))


def _both_halves(rotation: Callable[[int], Rotation], length: int) -> Rotation:
    """Each angle for both members of its pair."""
    once = rotation(length)
    cos, sin = (torch.cat([angles, angles], dim=-1) for angles in (once.cos, once.sin))
    return Rotation(cos, sin, interleaved=False)


def _experts(mlp: Any) -> Experts:
    experts = mlp.experts
    width = experts.gate_up_proj.shape[2]
    return Experts(
        block=mlp,
        module=experts,
        stored_as_rows=True,
        gate=range(0, width, 2),
        up=range(1, width, 2),
        activation=_activation(experts.limit, experts.alpha),
    )


def _activation(limit: float, alpha: float) -> Activation:
    def activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)

    return activation

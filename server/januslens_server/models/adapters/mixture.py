"""Mixtures of experts as transformers 5 lays them out in every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from januslens_server.models.experts import Experts
from januslens_server.models.views import ModelView

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gated_experts(mlp: Any) -> Experts:
    """Gate and up stand one behind the other in `gate_up_proj`, which is stored transposed."""
    experts = mlp.experts
    width = experts.gate_up_proj.shape[1] // 2

    def activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        neurons: torch.Tensor = experts.act_fn(gate) * up
        return neurons

    return Experts(
        block=mlp,
        module=experts,
        stored_as_rows=False,
        gate=range(width),
        up=range(width, 2 * width),
        activation=activation,
    )


def with_experts(view: ModelView, n_experts: int, d_mlp: int) -> ModelView:
    """The view with the sizes of its experts."""
    return replace(view, facts=replace(view.facts, n_experts=n_experts, d_mlp=d_mlp))

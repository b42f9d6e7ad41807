"""Recognising a norm by what it does."""

from __future__ import annotations

import torch
from torch import nn

from januslens_server.errors import ModelFailed
from januslens_server.lens.norm import Norm
from januslens_server.models.automatic.probe import Event

# Largest relative difference between a norm module's output and our formula's.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def read_norm(event: Event) -> Norm:
    """The norm's numbers, from the candidate that gives what the module gave.

    Raises `ModelFailed` if it is neither LayerNorm nor RMSNorm, with weight or 1 + weight.
    """
    module = event.module
    weight = module.get_parameter("weight").detach().float()
    bias = getattr(module, "bias", None)
    offset = None if bias is None else bias.detach().float()
    for centred in (isinstance(module, nn.LayerNorm), not isinstance(module, nn.LayerNorm)):
        for multiplier in (weight, 1 + weight):
            norm = Norm(multiplier, offset, epsilon(module), centred)
            if _gives(norm, event):
                return norm
    raise ModelFailed(f"expected {event.name} to be a LayerNorm or RMSNorm, got neither")


def epsilon(module: nn.Module) -> float:
    """The norm's epsilon, under the names that families give it."""
    for name in ("eps", "variance_epsilon", "epsilon", "norm_eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    raise ModelFailed(f"expected {type(module).__name__} to have an epsilon, found none")


def _gives(norm: Norm, event: Event) -> bool:
    expected = event.output.float()
    difference = (norm(event.input) - expected).abs().max()
    return bool(difference <= TOLERANCE[event.output.dtype] * expected.abs().max())

"""Reading the modules that architecture families share."""

from __future__ import annotations

from typing import Any

from torch import nn

from januslens_server.lens.norm import Norm
from januslens_server.models.views import Linear


def linear(module: nn.Module) -> Linear:
    """An `nn.Linear`, which stores its weight transposed."""
    return Linear(module, stored_as_rows=False)


def interleaved(module: nn.Module, part: int, n_heads: int, d_head: int) -> Linear:
    """Query (0), key (1) or value (2) of a fused `nn.Linear` that holds them head by head."""
    columns = tuple(
        (3 * head + part) * d_head + i for head in range(n_heads) for i in range(d_head)
    )
    return Linear(module, stored_as_rows=False, columns=columns)


def layer_norm(module: Any) -> Norm:
    """An `nn.LayerNorm`."""
    bias = None if module.bias is None else module.bias.detach().float()
    return Norm(module.weight.detach().float(), bias, module.eps, centred=True)


def rms_norm(module: Any) -> Norm:
    """A Llama-like RMSNorm, which names its epsilon `variance_epsilon`."""
    return Norm(module.weight.detach().float(), None, module.variance_epsilon, centred=False)

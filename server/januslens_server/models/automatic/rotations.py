"""The rotary embeddings that a layer may use, and the ways in which pairs of dimensions turn."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from januslens_server.capture import Rotation

# How many `pairings` there are.
PAIRINGS = 3

# None: queries and keys do not turn.
RotationOfLength = Callable[[int], Rotation] | None


def rotations(
    network: nn.Module, blocks: list[nn.Module], layer: int, kind: str | None
) -> list[RotationOfLength]:
    """Every reading of the rotary embeddings that `layer` could use; the first is none at all.

    The layer's own embedding, if its block has one, or those of the whole model. Embeddings that
    hold one rotation for each kind of layer give that of the layer's own `kind`, then the others.
    """
    inside = {module for block in blocks for module in block.modules()}
    own = [module for module in blocks[layer].modules() if _is_rotary(module)]
    shared = [m for m in network.modules() if _is_rotary(m) and m not in inside]
    found: list[RotationOfLength] = [None]
    for rotary in own or shared:
        for which in _choices(rotary, kind):
            found += [partial(_rotation, rotary, which, pairing) for pairing in range(PAIRINGS)]
    return found


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def _choices(rotary: Any, kind: str | None) -> list[dict[str, str]]:
    """The keyword arguments that select a rotation of the module."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return [{}]
    kinds = [
        name.removesuffix("_inv_freq")
        for name, _ in rotary.named_buffers(recurse=False)
        if name.endswith("_inv_freq") and not name.endswith("original_inv_freq")
    ]
    return [{"layer_type": k} for k in sorted(kinds, key=lambda k: (k != kind, k))]


def _rotation(rotary: Any, which: dict[str, str], pairing: int, length: int) -> Rotation:
    device = next(rotary.buffers()).device
    positions = torch.arange(length, device=device)[None]
    cos, sin = rotary(torch.empty(0, device=device), positions, **which)
    return pairings(cos[0], sin[0])[pairing]


def pairings(cos: torch.Tensor, sin: torch.Tensor) -> list[Rotation]:
    """What models make of the `[pos, rotary]` that their rotary embedding gives.

    Pairs half a head apart; neighbouring pairs; neighbouring pairs that take each angle from the
    first half.
    """
    cos_twice, sin_twice = (
        angles.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for angles in (cos, sin)
    )
    return [
        Rotation(cos, sin, interleaved=False),
        Rotation(cos, sin, interleaved=True),
        Rotation(cos_twice, sin_twice, interleaved=True),
    ]

"""Models with several residual streams: hyper-connections (DeepSeek V4) and AltUp (Gemma 3n).

Their blocks pass on a tensor with an axis for the streams. Here the blocks are made to pass on the
vectors of all streams side by side, `[batch, pos, streams * d_model]`, as one residual stream, and
the map that merges the streams behind the last block is found by its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from januslens_server.capture.hooks import nth_tensor
from januslens_server.lens.merge import GatedMean, Merge, ProjectedMean, WeightedSum
from januslens_server.models.adapters.observed_pass import epsilon

# Why such a block shows its residual stream only.
MIXING = "the block mixes {} residual streams side by side (hyper-connections or AltUp)"


@dataclass(frozen=True)
class StreamAxis:
    """The axis of the streams in what blocks pass on.

    It is `first`, `[streams, batch, pos, d_model]`, or behind that of the positions.
    """

    streams: int
    first: bool

    @classmethod
    def of(cls, passed: torch.Tensor, positions: int) -> StreamAxis | None:
        """Return the axis of a tensor with a batch of 1; None if it has another shape."""
        if passed.dim() != 4:
            return None
        shape = passed.shape
        if shape[:2] == (1, positions):
            return cls(shape[2], first=False)
        return cls(shape[0], first=True) if shape[1:3] == (1, positions) else None

    def flat(self, whole: torch.Tensor) -> torch.Tensor:
        """Return `[batch, pos, streams * d_model]`, given what a block passes on."""
        return (whole.permute(1, 2, 0, 3) if self.first else whole).flatten(-2)

    def whole(self, flat: torch.Tensor) -> torch.Tensor:
        """Return what a block passes on, given `[batch, pos, streams * d_model]`."""
        divided: torch.Tensor = flat.unflatten(-1, (self.streams, -1))
        return divided.permute(2, 0, 1, 3).contiguous() if self.first else divided


def pass_side_by_side(blocks: Iterable[nn.Module], axis: StreamAxis) -> None:
    """Make blocks pass on the vectors of all streams side by side.

    Hooks of a block, and its `forward`, then get and return `[batch, pos, streams * d_model]`;
    callers of the block pass on what they did before. Modules and parameters keep their names.
    """
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for block in blocks:
        kind = type(block)
        if kind not in classes:
            members = {
                "__module__": kind.__module__,
                "__call__": _around(kind.__call__, axis.flat, axis.whole),
                "forward": _around(kind.forward, axis.whole, axis.flat),
            }
            classes[kind] = type(kind.__name__, (kind,), members)
        block.__class__ = classes[kind]
        own = vars(block).get("forward")  # offloaded parameters are loaded by a forward of its own
        if own is not None:
            block.forward = _around(own, axis.whole, axis.flat)


def _around(
    function: Callable[..., Any],
    before: Callable[[torch.Tensor], torch.Tensor],
    after: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[..., Any]:
    """Return a function with the first tensor of its arguments and of its result changed."""

    def changed(*args: Any, **named: Any) -> Any:
        given = nth_tensor(args, named)
        new = before(given)
        output = function(
            *(new if value is given else value for value in args),
            **{name: new if value is given else value for name, value in named.items()},
        )
        if isinstance(output, torch.Tensor):
            return after(output)
        first = nth_tensor(output)
        return type(output)([after(first) if value is first else value for value in output])

    return changed


def find_merge(modules: Sequence[nn.Module]) -> Merge | None:
    """Return the map that merges the streams, among the modules outside of the blocks.

    It is recognised by the names of its parameters; the model's own logits must confirm it.
    """
    for module in modules:
        own: Any = module
        names = {name for name, _ in module.named_parameters()}
        if {"hc_fn", "hc_base", "hc_scale"} <= names:
            return WeightedSum(
                _float(own.hc_fn),
                _float(own.hc_base),
                _float(own.hc_scale),
                floor=own.eps,
                eps=epsilon(own.input_norm),
            )
        if {"hc_norm.weight", "input_mix_weight_down.weight"} <= names:
            weight = 1 + _float(own.hc_norm.weight)
            return GatedMean(
                weight.unflatten(-1, (-1, own.hc_norm.group_size)),
                _float(own.input_mix_weight_down.weight),
                _float(own.input_mix_weight_up.weight),
                eps=epsilon(own.hc_norm),
            )
        if maps := getattr(own, "altup_unembed_projections", None):
            return ProjectedMean(torch.stack([_float(each.weight).T for each in maps]))
    return None


def _float(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().float()

"""Changes of weights for one forward pass, without touching the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from januslens_server.capture.taps import Columns, add_to_columns, nth_tensor


@dataclass(frozen=True)
class LowRank:
    """A change `inputs^T outputs` of a matrix: `inputs` `[rank, d_in]`, `outputs` `[rank, d_out]`.

    It is never formed: `x (W + inputs^T outputs) = x W + (x inputs^T) outputs`.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """What the change adds to `x W`, `[..., d_out]` in float32, for `x` `[..., d_in]`."""
        return (x.float() @ self.inputs.float().to(x.device).T) @ self.outputs.to(x.device)


class Overlay(Protocol):
    """Changes a module's output to that of changed weights."""

    @property
    def module(self) -> nn.Module:
        """Whose output it changes."""

    def over(self, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """The changed output, from the module's input and its own output."""


@dataclass(frozen=True)
class LinearOverlay:
    """A change of the `columns` of one linear module."""

    module: nn.Module
    columns: Columns | None
    change: LowRank

    def over(self, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """The output with the change's share on the columns."""
        added = self.change.times(nth_tensor(args))
        return add_to_columns(output, self.columns, added.to(output.dtype))


@contextmanager
def overlaid(overlays: Iterable[Overlay]) -> Iterator[None]:
    """Run the model as if its weights were changed; the resident ones stay as they are."""
    with ExitStack() as hooks:
        for overlay in overlays:
            handle = overlay.module.register_forward_hook(_hook(overlay))
            hooks.callback(handle.remove)
        yield


def _hook(
    overlay: Overlay,
) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def change(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return overlay.over(args, output)

    return change

"""Low-rank changes of weights for one forward pass, without touching the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from januslens_server.capture.taps import Columns, add_to_columns, nth_tensor


@dataclass(frozen=True)
class Overlay:
    """`W += inputs^T outputs` on the `columns` of one linear module.

    `inputs` `[rank, d_in]`, `outputs` `[rank, d_out]`: `y = x W` becomes
    `y + (x inputs^T) outputs`, so nothing of the weight's size is formed.
    """

    module: nn.Module
    columns: Columns | None
    inputs: torch.Tensor
    outputs: torch.Tensor


@contextmanager
def overlaid(overlays: Iterable[Overlay]) -> Iterator[None]:
    """Run the model as if its weights were changed; the resident ones stay as they are."""
    with ExitStack() as hooks:
        for overlay in overlays:
            handle = overlay.module.register_forward_hook(_adding(overlay))
            hooks.callback(handle.remove)
        yield


def _adding(
    overlay: Overlay,
) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def add(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        x = nth_tensor(args).float()
        added = (x @ overlay.inputs.to(x.device).T) @ overlay.outputs.to(x.device)
        return add_to_columns(output, overlay.columns, added.to(output.dtype))

    return add

"""Where a tensor can be read: one end of one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

# Features of a fused module's output: one run of them, or scattered ones (interleaved heads).
Columns = range | tuple[int, ...]


class End(Enum):
    """Which end of a module is read."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True)
class Tap:
    """One end of a module, and which of its features.

    `columns` selects features of the last dimension (None: all): fused projections hold
    several maps. `argument` counts the tensors that go in or come out. `overwritten`: the model
    writes to the module's output in place, and is handed a copy of it instead.
    """

    module: nn.Module
    end: End
    columns: Columns | None = None
    argument: int = 0
    overwritten: bool = False

    def read(self, value: torch.Tensor) -> torch.Tensor:
        """The tapped features `[batch, pos, features]` of the module's whole tensor."""
        return select(value, self.columns)


def select(whole: torch.Tensor, columns: Columns | None) -> torch.Tensor:
    """The `columns` of a tensor `[..., features]`.

    None gives the very same tensor, not a view of it: autograd knows only that one.
    """
    return whole if columns is None else whole[..., _index(columns)]


def rows(captured: torch.Tensor) -> torch.Tensor:
    """One prompt's `[pos, features]`, also where a module gets them without a batch axis (OPT)."""
    return captured.flatten(0, -2)


def add_to_columns(
    whole: torch.Tensor, columns: Columns | None, added: torch.Tensor
) -> torch.Tensor:
    """A copy of `[..., features]` with `added` on its `columns`."""
    changed = whole.clone()
    changed[..., slice(None) if columns is None else _index(columns)] += added
    return changed


def _index(columns: Columns) -> slice | list[int]:
    if isinstance(columns, range):
        return slice(columns.start, columns.stop, columns.step)
    return list(columns)


def nth_tensor(values: Any, named: Mapping[str, Any] | None = None, n: int = 0) -> torch.Tensor:
    """The nth tensor a module takes or gives, among the ways Hugging Face modules pass them.

    Blocks return a tensor or a tuple by version; some take `hidden_states` by keyword.
    """
    passed = (values,) if isinstance(values, torch.Tensor) else (*values, *(named or {}).values())
    tensors = [value for value in passed if isinstance(value, torch.Tensor)]
    if n >= len(tensors):
        raise TypeError(f"expected a module that passes {n + 1} tensors, got {len(tensors)}")
    return tensors[n]

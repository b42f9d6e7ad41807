"""Read tensors of a model during one forward pass, or change its outputs, with hooks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from januslens_server.errors import CancelCheck

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
        raise TypeError(f"module passes {len(tensors)} tensors; expected at least {n + 1}")
    return tensors[n]


Key = TypeVar("Key", bound=Hashable)


@contextmanager
def capturing(
    taps: Mapping[Key, Tap],
    check_cancelled: CancelCheck | None = None,
    check_before: Iterable[nn.Module] = (),
    keep: Callable[[Key, torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[dict[Key, torch.Tensor]]:
    """Fill the yielded dictionary while the model runs.

    Each tensor is what the module passed, `[batch, pos, features]`, not a copy: autograd knows
    only that one. `check_cancelled` is called before every module in `check_before`; what it
    raises ends the forward pass. `keep` may record a part of a tensor instead, by its key.
    """
    captured: dict[Key, torch.Tensor] = {}
    with ExitStack() as hooks:
        if check_cancelled is not None:
            for module in check_before:
                hooks.enter_context(_calling(check_cancelled, module))
        for key, tap in taps.items():
            hooks.enter_context(_recording(key, tap, captured, keep))
        yield captured


@contextmanager
def _calling(check_cancelled: CancelCheck, module: nn.Module) -> Iterator[None]:
    def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        check_cancelled()

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recording(
    key: Key,
    tap: Tap,
    captured: dict[Key, torch.Tensor],
    keep: Callable[[Key, torch.Tensor], torch.Tensor] | None,
) -> Iterator[None]:
    def record(whole: torch.Tensor) -> None:
        read = tap.read(whole)
        captured[key] = read if keep is None else keep(key, read)

    def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        record(nth_tensor(args, named, tap.argument))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        whole = nth_tensor(output, n=tap.argument)
        record(whole)
        return whole.clone() if tap.overwritten else None

    if tap.end is End.INPUT:
        handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = tap.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


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

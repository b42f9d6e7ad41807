"""Use hooks to read tensors of a model during a forward pass, or to change module outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from januslens_server.errors import CancelCheck
from januslens_server.transfer import DeviceIndex

# Features of a fused module's output: consecutive ones, or any others (interleaved heads).
Columns = range | tuple[int, ...]


class End(Enum):
    """Whether a tap reads a module's input or its output."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True)
class Tap:
    """A tensor to read: the input or output of a module, or some features of it.

    `columns` selects features of the last dimension, for example those of one map of a fused
    module; None selects all. `argument` is the number of the tensor among the module's inputs or
    outputs, from 0. `overwritten` means that the model modifies the module's output in place; the
    model then gets a copy, so that the captured tensor keeps its values. `heads_first` means that
    the tensor is `[batch, heads, pos, d_head]`; it is read as `[batch, pos, heads, d_head]`.
    """

    module: nn.Module
    end: End
    columns: Columns | None = None
    argument: int = 0
    overwritten: bool = False
    heads_first: bool = False

    def read(self, value: torch.Tensor) -> torch.Tensor:
        """Return the tapped features `[batch, pos, features]` of the module's whole tensor."""
        return select(value.transpose(1, 2) if self.heads_first else value, self.columns)

    def write(self, value: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the module's whole tensor with other tapped `features`, shaped as `read` does."""
        if self.columns is not None:
            changed = (value.transpose(1, 2) if self.heads_first else value).clone()
            changed[..., _index(self.columns, value.device)] = features
            features = changed
        return features.transpose(1, 2) if self.heads_first else features


def select(whole: torch.Tensor, columns: Columns | None) -> torch.Tensor:
    """Select the `columns` of a tensor `[..., features]`.

    With None, the same tensor object is returned and not a view, because autograd computes
    gradients only for tensors that the model itself uses.
    """
    return whole if columns is None else whole[..., _index(columns, whole.device)]


def rows(captured: torch.Tensor) -> torch.Tensor:
    """Flatten a captured tensor to `[pos, features]`; some modules (OPT) have no batch axis."""
    return captured.flatten(0, -2)


def add_to_columns(
    whole: torch.Tensor, columns: Columns | None, added: torch.Tensor
) -> torch.Tensor:
    """Return a copy of `whole` `[..., features]` with `added` added to its `columns`."""
    changed = whole.clone()
    changed[..., slice(None) if columns is None else _index(columns, whole.device)] += added
    return changed


def _index(columns: Columns, device: torch.device) -> slice | torch.Tensor:
    if isinstance(columns, range):
        return slice(columns.start, columns.stop, columns.step)
    return _device_index(columns).on(device)


@functools.lru_cache(maxsize=1024)
def _device_index(columns: tuple[int, ...]) -> DeviceIndex:
    """Return the index of a fused module's features, which are the same at every call."""
    return DeviceIndex(columns)


def nth_tensor(values: Any, named: Mapping[str, Any] | None = None, n: int = 0) -> torch.Tensor:
    """Return the nth tensor among a module's arguments or outputs.

    Depending on the release of transformers, blocks return a tensor or a tuple. Some take
    `hidden_states` as a keyword argument.
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
    """Capture the tapped tensors of forward passes inside the context in the yielded dictionary.

    The captured tensors `[batch, pos, features]` are the module's own and not copies, because
    autograd computes gradients only for those. `check_cancelled` is called before every module in
    `check_before`; an exception from it ends the forward pass. If `keep` is given, the dictionary
    gets the tensor that it returns for a key and its captured tensor.
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


@contextmanager
def rewriting(
    tap: Tap, rewrite: Callable[[torch.Tensor], torch.Tensor], *, in_place: bool = False
) -> Iterator[None]:
    """Inside the context, replace the tapped features `[batch, pos, ...]` by `rewrite` of them.

    `in_place` changes the tensor itself, for one that the model also uses under another name.
    """

    def changed(whole: torch.Tensor) -> torch.Tensor:
        return tap.write(whole, rewrite(tap.read(whole)))

    def before(
        _module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        whole = nth_tensor(args, named, tap.argument)
        new = changed(whole)
        if in_place:
            whole.copy_(new)
            return args, named
        return (
            tuple(new if value is whole else value for value in args),
            {name: new if value is whole else value for name, value in named.items()},
        )

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        whole = nth_tensor(output, n=tap.argument)
        new = changed(whole)
        if isinstance(output, torch.Tensor):
            return new
        return type(output)([new if value is whole else value for value in output])

    if tap.end is End.INPUT:
        handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = tap.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rewriting_result(
    module: nn.Module, rewrite: Callable[[nn.Module, tuple[Any, ...], Any], Any]
) -> Iterator[None]:
    """Inside the context, replace whatever a module returns by `rewrite(module, args, output)`."""
    handle = module.register_forward_hook(rewrite)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def returning(module: nn.Module, see: Callable[[Any], None]) -> Iterator[None]:
    """Pass every output of a module to `see` inside the context."""

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        see(output)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def seeing(tap: Tap, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Inside the context, pass the tapped features of a module's output to `see`."""

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        see(tap.read(nth_tensor(output, n=tap.argument)))

    handle = tap.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of a matrix, `inputs^T outputs`.

    `inputs` is `[rank, d_in]` and `outputs` `[rank, d_out]`. Their product is never computed:
    `x (W + inputs^T outputs) = x W + (x inputs^T) outputs`.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x inputs^T outputs` `[..., d_out]` in float32, for `x` `[..., d_in]`."""
        return (x.float() @ self.inputs.float().to(x.device).T) @ self.outputs.to(x.device)


class Overlay(Protocol):
    """Changes the output of a module as if its weights were changed."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    def over(self, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the changed output, given the module's arguments and its output."""


@dataclass(frozen=True)
class LinearOverlay:
    """A low-rank change of some `columns` of one linear module, or of all (None)."""

    module: nn.Module
    columns: Columns | None
    change: LowRank

    def over(self, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the output with the change applied to the columns."""
        added = self.change.times(nth_tensor(args))
        return add_to_columns(output, self.columns, added.to(output.dtype))


@contextmanager
def overlaid(overlays: Iterable[Overlay]) -> Iterator[None]:
    """Inside the context, run the model as if its weights were changed; no weight is modified."""
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

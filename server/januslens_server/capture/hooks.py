"""Context-managed hooks: on while one forward pass runs, gone after it, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from januslens_server.capture.taps import End, Tap, nth_tensor
from januslens_server.errors import CancelCheck

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

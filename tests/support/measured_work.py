"""Measure a computation: operations, peak memory, processor time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class PeakMemory(TorchDispatchMode):
    """The peak size in bytes of the storages that are created inside the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        known = self._storages((args, kwargs or {}))
        output = function(*args, **(kwargs or {}))
        for key, storage in self._storages(output).items():
            if key not in known and key not in self._alive:
                self._alive[key] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, self.alive)
        return output

    @property
    def alive(self) -> int:
        """Return the bytes in use now."""
        return sum(self._alive.values())

    @staticmethod
    def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
        leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        tensors = (tensor for tensor in leaves if tensor.layout is torch.strided)
        return {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}


def peak_memory(run: Callable[[], object]) -> int:
    """Return the peak of the bytes in use, without those in use before."""
    with PeakMemory() as memory:
        run()
    peak: int = memory.peak
    return peak


def held_memory(steps: Iterator[object]) -> int:
    """Return the peak of the bytes in use between two steps."""
    held = 0
    with PeakMemory() as memory:
        for _ in steps:
            held = max(held, memory.alive)
    return held


def operations(run: Callable[[], object]) -> float:
    """Return the floating-point operations of its matrix products and attention."""
    packed = {torch.ops.mkldnn._linear_pointwise: _packed_product}
    with FlopCounterMode(display=False, custom_mapping=packed) as counter:
        run()
    return float(counter.get_total_flops())


def processor_seconds(run: Callable[[], object], repeats: int = 2) -> float:
    """Return the best processor time of this thread over several runs."""
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    return min(times)


def _packed_product(vectors: torch.Size, matrix: torch.Size, *_: object, **__: object) -> int:
    """Return the operations of a product with a packed matrix, which torch does not count."""
    return 2 * vectors.numel() * matrix[0]

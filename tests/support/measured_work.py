"""Measure a computation: operations, peak memory, processor time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Step = TypeVar("Step")


class PeakMemory(TorchDispatchMode):
    """The size in bytes of the storages created inside the context: in use now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.alive = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

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
            if key not in known and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.alive += self._sizes[key]
                weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.alive)
        return output

    def _freed(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    @staticmethod
    def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
        leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        tensors = (tensor for tensor in leaves if tensor.layout is torch.strided)
        return {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}


@dataclass(frozen=True)
class Work:
    """Bytes in use at most, bytes in use at most between two steps, and operations."""

    memory: int
    held: int
    flops: float


def work(steps: Iterable[Step], use: Callable[[Step], object] = lambda _: None) -> Work:
    """Run the steps, pass each to `use`, and return the work without what was there before.

    Operations are the floating-point operations of matrix products and attention.
    """
    held = 0
    packed = {torch.ops.mkldnn._linear_pointwise: _packed_product}
    with PeakMemory() as memory, FlopCounterMode(display=False, custom_mapping=packed) as counter:
        for step in steps:
            held = max(held, memory.alive)
            use(step)
    return Work(memory.peak, held, float(counter.get_total_flops()))


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

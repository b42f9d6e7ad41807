"""CPU acceleration of the lens: worker threads and reused buffers.

Torch splits an operation into equal parts, one per core, and waits for the slowest. Often some
cores are busy, because messages are encoded or other programs run at the same time. So the lens
computes in pieces of some milliseconds, and each core takes the next piece when it has finished
one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def on_free_cores(work: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
    """Call `work` with every item on torch's number of cores; return the results in order.

    Each item is computed on one core, so the number of cores does not change the results.
    """
    cores = torch.get_num_threads()
    if cores == 1 or len(items) < 2:
        return [work(item) for item in items]
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alike(item: ItemT) -> ResultT:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(item)

    return list(_pool(cores).map(alike, items))


@functools.cache
def _pool(cores: int) -> ThreadPoolExecutor:
    """Return a pool of threads, each of which computes on one core."""
    pool = ThreadPoolExecutor(cores, "lens")
    every = threading.Barrier(cores)
    list(pool.map(_compute_alone, [every] * cores))
    # Threads inherit the last number that any thread has set, so restore it for later threads.
    torch.set_num_threads(cores)
    return pool


def _compute_alone(every: threading.Barrier) -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # torch applies the setting to this thread on the first call
    every.wait()


class ThreadBuffers(threading.local):
    """Reusable float32 buffers of one thread, by name.

    On a CPU, the kernel clears every new page. For a chunk of logits, this takes a sixth of the
    time of computing them. On a GPU, torch's own allocator reuses freed memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Return an uninitialised matrix, valid until this thread requests the same name again."""
        if device.type != "cpu":
            return torch.empty(rows, columns, device=device)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[name] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)

    def like(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """Return a buffer as `matrix` does, with the shape and device of another matrix."""
        return self.matrix(name, matrix.shape[0], matrix.shape[1], matrix.device)

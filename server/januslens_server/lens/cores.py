"""A CPU's cores, each of which takes the next piece of work when it has done its last.

Torch cuts an operation into equal parts, one a core, and waits for the slowest. Cores are never
all free: messages are encoded beside the projection, clients and other programs run. With pieces
of some milliseconds a core that does something else meanwhile delays nobody.
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
    """`work` on every item, on as many cores as torch uses here; the results in the items' order.

    Each item is computed on one core: how many there are does not change a bit of it.
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
    """So many threads, each of which computes alone."""
    pool = ThreadPoolExecutor(cores, "lens")
    every = threading.Barrier(cores)
    list(pool.map(_compute_alone, [every] * cores))
    # What a thread sets for itself torch takes for every thread that begins later.
    torch.set_num_threads(cores)
    return pool


def _compute_alone(every: threading.Barrier) -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # from the first question on it holds for this thread
    every.wait()

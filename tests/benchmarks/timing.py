"""Time several actions in alternation, so that other load on the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Seconds = dict[str, float]


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Return the median seconds of each action over `rounds` rounds, after one warm-up round."""
    for action in actions.values():
        action()
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            taken[name].append(seconds(action, clock))
    return {name: statistics.median(times) for name, times in taken.items()}


def seconds(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one run, including its work on a GPU."""
    _finish_on_device()
    started = clock()
    action()
    _finish_on_device()
    return clock() - started


def _finish_on_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Gauges of the server's state.

A single process updates them at each scrape. With several processes, the supervisor answers scrapes
from files, so each process writes its gauges to files at intervals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from prometheus_client import Gauge

from januslens_server import telemetry
from januslens_server.models.device_memory import kinds, used_bytes, watched_devices
from januslens_server.results import ModelState

Reading = Callable[[], float]

# Seconds between two writes.
WRITE_INTERVAL = 0.25

_shown: dict[Gauge, Reading] = {}
_at_scrapes = False


def read_at_scrapes() -> None:
    """Update the gauges at every scrape, from now on."""
    global _at_scrapes  # noqa: PLW0603 - a process has one page
    _at_scrapes = True
    for gauge, read in _shown.items():
        gauge.set_function(read)


async def keep_written() -> None:
    """Write the gauges at intervals, forever."""
    while True:
        for gauge, read in list(_shown.items()):
            gauge.set(read())
        await asyncio.sleep(WRITE_INTERVAL)


def _show(gauge: Gauge, read: Reading) -> None:
    _shown[gauge] = read
    if _at_scrapes:
        gauge.set_function(read)


def show_requests(waiting: Reading, in_flight: Reading) -> None:
    """Show how many requests wait and how many have started."""
    _shown[telemetry.QUEUE_DEPTH] = waiting
    _shown[telemetry.IN_FLIGHT] = in_flight


def show_memory(configured: str) -> None:
    """Show the memory of every device that models may use, by kind."""
    for device in watched_devices(configured):
        for kind in kinds(device):
            gauge = telemetry.DEVICE_MEMORY.labels(device, kind)
            _shown[gauge] = partial(used_bytes, device, kind)


def show_model(name: str, state: ModelState, loaded_fraction: Reading) -> None:
    """Show a model's state, 1 for the current one and 0 for all others, and its loaded share."""
    for shown in ModelState:
        telemetry.MODEL_STATE.labels(name, shown.name).set(state is shown)
    _show(telemetry.LOADED_FRACTION.labels(name), loaded_fraction)


def hide_model(name: str) -> None:
    """Show a model no longer, because it is unloaded; call it in the event loop."""
    _shown.pop(telemetry.LOADED_FRACTION.labels(name), None)

"""Gauges that show the running server's state: read when they are scraped, or written down.

A scrape of several processes reaches none of them: each writes down what it would show.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from prometheus_client import Gauge

from januslens_server import telemetry
from januslens_server.models.device_memory import kinds, used_bytes, watched_devices
from januslens_server.results import ModelState, ModelStatus

Reading = Callable[[], float]

# Seconds that what is written down may be old.
WRITE_INTERVAL = 0.25

_shown: dict[Gauge, Reading] = {}


def read_at_scrapes() -> None:
    """Let every scrape read what is to be shown."""
    for gauge, read in _shown.items():
        gauge.set_function(read)


async def keep_written() -> None:
    """Write down what is to be shown, for good."""
    while True:
        for gauge, read in _shown.items():
            gauge.set(read())
        await asyncio.sleep(WRITE_INTERVAL)


def show_requests(waiting: Reading, in_flight: Reading) -> None:
    """How many requests wait and how many are being served."""
    _shown[telemetry.QUEUE_DEPTH] = waiting
    _shown[telemetry.IN_FLIGHT] = in_flight


def show_memory(configured: str) -> None:
    """What every device that models may use has, by kind."""
    for device in watched_devices(configured):
        for kind in kinds(device):
            gauge = telemetry.DEVICE_MEMORY.labels(device, kind)
            _shown[gauge] = partial(used_bytes, device, kind)


def show_model(status: ModelStatus) -> None:
    """The model's present state, and that it is in no other."""
    for state in ModelState:
        here = status.state is state
        telemetry.MODEL_STATE.labels(status.name, state.name).set(here)

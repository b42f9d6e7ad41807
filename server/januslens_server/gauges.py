"""Gauges that show the running server's state when they are scraped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from januslens_server import telemetry
from januslens_server.models.device_memory import kinds, used_bytes, watched_devices
from januslens_server.results import ModelState, ModelStatus


def show_requests(waiting: Callable[[], float], in_flight: Callable[[], float]) -> None:
    """How many requests wait and how many are being served."""
    telemetry.QUEUE_DEPTH.set_function(waiting)
    telemetry.IN_FLIGHT.set_function(in_flight)


def show_memory(configured: str) -> None:
    """What every device that models may use has, by kind."""
    for device in watched_devices(configured):
        for kind in kinds(device):
            gauge = telemetry.DEVICE_MEMORY.labels(device, kind)
            gauge.set_function(partial(used_bytes, device, kind))


def show_model(status: ModelStatus) -> None:
    """The model's present state, and that it is in no other."""
    for state in ModelState:
        here = status.state is state
        telemetry.MODEL_STATE.labels(status.name, state.name).set(here)

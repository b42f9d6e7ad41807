"""All of a server but its ports: the device's thread, the models, and the services over them."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading

import torch

from januslens_server import gauges, telemetry
from januslens_server.access.directory import CallersFile
from januslens_server.access.quotas import QuotaBook
from januslens_server.config import ServerSettings
from januslens_server.models.failures import in_service_terms
from januslens_server.models.registry import Registry
from januslens_server.pipelines.cost import Pace
from januslens_server.results import ModelStatus
from januslens_server.rpc.admission import Admission, Limits
from januslens_server.rpc.health import Health, is_ready
from januslens_server.rpc.methods import RPCS
from januslens_server.rpc.server import build_server
from januslens_server.rpc.service import IntrospectionService
from januslens_server.rpc.streaming import DeviceStreams
from januslens_server.scheduling.worker import DeviceWorker
from januslens_server.serving.loading import check_with, load_all, log_state, sources
from januslens_server.serving.signals import heed_signals
from januslens_server.serving.stopping import finish, on_device_lost

# What a thread may keep the interpreter while others wait, in seconds. The cores' threads come back
# to it every few milliseconds, and an encoder would keep them for Python's usual five.
SWITCH_SECONDS = 0.001

logger = logging.getLogger("januslens_server")


class Assembly:
    """A server that is put together and listens nowhere yet.

    `stop` is set by signals, `loaded` when no model loads any more, `lost` when the device computes
    no more.
    """

    def __init__(self, settings: ServerSettings) -> None:
        """In the event loop that will serve. Raises `OSError` for callers that cannot be read."""
        check_device(settings.device)
        use_cores(settings)
        self._loop = asyncio.get_running_loop()
        self._grace = settings.grace_seconds
        self._callers = _callers(settings)
        self.stop = heed_signals(self.reload_callers)
        self.loaded, self.lost = asyncio.Event(), asyncio.Event()
        self.health = Health()
        lost = on_device_lost(self.health, self._loop, self.lost)
        memory = settings.max_request_memory
        self._worker = DeviceWorker(settings.max_waiting, in_service_terms, lost, memory)
        gauges.show_requests(lambda: self._worker.waiting, lambda: self._worker.in_flight)
        gauges.show_memory(settings.device)
        self._streams = DeviceStreams(self._worker, settings.stall_seconds)
        paces: dict[str, Pace] = {}
        check = check_with(paces, index_neurons=settings.index_neurons)
        self.registry = Registry(sources(settings), check, self._observe)
        quotas = QuotaBook()
        service = IntrospectionService(
            self.registry,
            Admission(_limits(settings), paces),
            self._streams,
            quotas=quotas,
            log_prompts=settings.log_prompts,
        )
        self.server = build_server(
            service,
            self.health,
            settings.max_connection_age_seconds,
            self._callers,
            quotas,
            share_port=settings.processes > 1,
        )
        self._announced = False
        self._background = [self._loop.create_task(telemetry.watch_event_loop())]
        if self._callers is not None:
            self._background.append(self._loop.create_task(self._callers.watch()))

    def announce(self) -> None:
        """Say what is served; from now on health follows the models' states."""
        self._announced = True
        statuses = self.registry.statuses()
        for status in statuses:
            gauges.show_model(status)
        self.health.update(statuses)

    def load(self) -> None:
        """Begin to load the models, in a thread that nobody waits for."""
        threading.Thread(target=self._load, name="model-loader", daemon=True).start()

    def _load(self) -> None:
        load_all(self.registry)
        self._loop.call_soon_threadsafe(self.loaded.set)

    def _observe(self, status: ModelStatus) -> None:
        """A model's state has changed; called by the thread that loads."""
        log_state(status)
        gauges.show_model(status)
        self._loop.call_soon_threadsafe(self._update)

    def _update(self) -> None:
        if not self._announced:
            return
        statuses = self.registry.statuses()
        self.health.update(statuses)
        if is_ready(statuses):
            logger.info("ready")

    def reload_callers(self) -> None:
        """Read the file of callers anew, if there is one."""
        if self._callers is not None:
            self._callers.reload()

    async def drain(self) -> None:
        """Refuse what is new, let what runs finish within the grace, and stop."""
        for task in self._background:
            task.cancel()
        self.health.drain()
        self.registry.close()
        self._worker.refuse_new()
        await finish(self.server, self._streams, self._grace)


def check_device(name: str) -> None:
    """Raise `OSError` if torch does not find this device on the machine."""
    if name in {"auto", "cpu"}:
        return
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise OSError(f"cannot serve: device {name!r} is not available: {reason}") from error


def use_cores(settings: ServerSettings) -> None:
    """As many as configured; else torch's own choice, divided among the processes."""
    sys.setswitchinterval(SWITCH_SECONDS)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    elif settings.processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.processes))


def _limits(settings: ServerSettings) -> Limits:
    return Limits(
        seconds=settings.max_request_seconds,
        memory=settings.max_request_memory,
        stream=settings.max_request_stream,
    )


def _callers(settings: ServerSettings) -> CallersFile | None:
    if settings.callers is None:
        return None
    try:
        return CallersFile(settings.callers, RPCS)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot serve: {error}") from error

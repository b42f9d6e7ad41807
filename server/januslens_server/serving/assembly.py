"""Build a server from its settings, load its models, serve, and drain."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import grpc
import torch

from januslens_server import gauges, telemetry, tuning
from januslens_server.access.directory import CallersFile, OpenDirectory
from januslens_server.access.quotas import QuotaBook
from januslens_server.config import ModelLocation, ServerSettings
from januslens_server.models.device_memory import free_for_requests
from januslens_server.models.failures import service_error
from januslens_server.models.loader import ModelSource
from januslens_server.models.registry import Registry, SelfCheck, embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.pipelines.cost import Pace, measured_pace
from januslens_server.pipelines.find_neurons import read_all_neurons
from januslens_server.pipelines.self_check import checked
from januslens_server.results import Guarantee, ModelState, ModelStatus
from januslens_server.rpc.admin import AdminService
from januslens_server.rpc.admission import Admission, Limits
from januslens_server.rpc.call import RPCS
from januslens_server.rpc.health import Health
from januslens_server.rpc.options import PeerLimits
from januslens_server.rpc.places import ENCODING, PREPARATION
from januslens_server.rpc.server import build_server
from januslens_server.rpc.service import IntrospectionService
from januslens_server.rpc.streaming import DeviceStreams
from januslens_server.rpc.usage import USAGE
from januslens_server.scheduling.worker import DeviceWorker
from januslens_server.serving.changes import AllowedSources, Changes
from januslens_server.serving.ports import listen
from januslens_server.serving.process import handle_signals

logger = logging.getLogger("januslens_server")

# The name of the embedded model, and the location that stands for it unless it is a folder.
EMBEDDED = "demo"

# Seconds between two checks of the progress of loading.
WATCH_SECONDS = 5.0


async def serve(settings: ServerSettings) -> None:
    """Serve as a single process until SIGTERM or SIGINT, then drain.

    Raises `OSError` if a port or device is not available.
    """
    assembly = Assembly(settings)
    gauges.read_at_scrapes()
    assembly.announce()
    health_server = await listen(assembly.server, assembly.health, settings)
    assembly.load()
    await assembly.stop.wait()
    await assembly.drain()
    if health_server is not None:
        await health_server.stop(0)


class Assembly:
    """A server without ports: the gRPC service with its models, device thread and health.

    `models` are those that it starts with. `stop` is set by SIGTERM and SIGINT, `loaded` when all
    of them are loaded or have failed, `lost` when the device has failed for good.
    """

    def __init__(
        self, settings: ServerSettings, models: Sequence[ModelLocation] | None = None
    ) -> None:
        """Must be called in the event loop that will serve; `models` replace the configured ones.

        Raises `OSError` if the device is not available or the callers' file is invalid.
        """
        check_device(settings.device)
        tuning.map_large_blocks()
        tuning.disable_tf32()
        tuning.set_threads(settings.threads, settings.processes)
        self._loop = asyncio.get_running_loop()
        self._grace = settings.grace_seconds
        self._callers = _callers(settings)
        directory = self._callers or OpenDirectory(admin=bool(settings.loadable))
        self.stop = handle_signals(self.reload_callers)
        self.loaded, self.lost = asyncio.Event(), asyncio.Event()
        self.health = Health(settings.max_watches)
        lost = on_device_lost(self.health, self._loop, self.lost)
        self._device = settings.device
        self._worker = DeviceWorker(settings.max_waiting, service_error, lost, self._free_memory)
        gauges.show_requests(lambda: self._worker.waiting, lambda: self._worker.in_flight)
        gauges.show_memory(settings.device)
        self._streams = DeviceStreams(self._worker, settings.stall_seconds, settings.max_unread)
        self._paces: dict[str, Pace] = {}
        check = self._check_with(index_neurons=settings.index_neurons)
        source_of = source_maker(settings)
        self.models = configured(settings) if models is None else models
        found = [source_of(model) for model in self.models]
        self.registry = Registry(found, check, self._observe, self._forget)
        self.changes = Changes(self.registry, source_of, AllowedSources(settings.loadable))
        quotas = QuotaBook()
        self._admission = Admission(_limits(settings), self._paces, self._worker.fits_alone)
        service = IntrospectionService(
            self.registry,
            self._admission,
            self._streams,
            quotas=quotas,
            log_prompts=settings.log_prompts,
        )
        self.server = build_server(
            service,
            self.health,
            settings.max_connection_age_seconds,
            directory,
            quotas,
            admin=AdminService(self.registry, self.changes),
            share_port=settings.processes > 1,
            peers=PeerLimits(settings.max_connections, settings.max_streams),
        )
        self._announced = False
        self.on_forget: Callable[[str], object] = lambda _name: None
        self.on_stall: Callable[[bool], object] = lambda _stalled: None
        self._background = [
            self._loop.create_task(telemetry.watch_event_loop()),
            self._loop.create_task(self._collect_garbage()),
            self._loop.create_task(USAGE.write_daily()),
            self._loop.create_task(self._watch_loading(settings.load_stall_seconds)),
        ]
        if self._callers is not None:
            self._background.append(self._loop.create_task(self._callers.watch()))

    def _free_memory(self, needed: float) -> float:
        """Bytes of device memory for requests, less what row caches will still need."""
        later = self.registry.bytes_cached_later() if self._device == "cpu" else 0
        return free_for_requests(self._device, needed + later) - later

    async def _collect_garbage(self) -> None:
        """Run full collections once the models' objects, which are many, are exempt from them."""
        await self.loaded.wait()
        await tuning.collect_garbage(self._busy)

    async def _watch_loading(self, longest: float) -> None:
        """Report in health whether the loading of models makes no progress for `longest` seconds.

        Calls `on_stall` with each change.
        """
        stalled = False
        while True:
            await asyncio.sleep(min(WATCH_SECONDS, longest / 4))
            seconds = self.registry.seconds_without_progress(time.monotonic())
            if (seconds > longest) is stalled:
                continue
            stalled = not stalled
            if stalled:
                logger.error("loading has made no progress for %.0f s", seconds)
            self.health.set_stalled(stalled)
            self.on_stall(stalled)

    def _busy(self) -> bool:
        """Whether requests are being prepared, run or encoded."""
        return PREPARATION.running + ENCODING.running + self._streams.unfinished > 0

    def announce(self) -> None:
        """Report the models' states in health and metrics from now on."""
        self._announced = True
        statuses = self.registry.statuses()
        for status in statuses:
            self._show(status)
        self.health.update(statuses)

    def load(self) -> None:
        """Start loading the models in a thread."""
        self.changes.run_load(self._load)

    def _load(self) -> None:
        self.registry.load_all()
        tuning.freeze_objects()
        self._loop.call_soon_threadsafe(self.loaded.set)

    def _observe(self, status: ModelStatus) -> None:
        """Log and report a model's new state; called by the loading thread."""
        log_state(status)
        self._show(status)
        self._loop.call_soon_threadsafe(self._update)

    def _show(self, status: ModelStatus) -> None:
        fraction = partial(self.registry.loaded_fraction, status.name)
        gauges.show_model(status.name, status.state, fraction)

    def _forget(self, name: str) -> None:
        """Report that a model is unloaded; called by the thread that unloaded it."""
        logger.info("model %s unloaded", name)
        self._paces.pop(name, None)
        self._admission.forget(name)
        # In the event loop, which writes gauges: they would create the series again.
        self._loop.call_soon_threadsafe(self._remove_series, name)
        self._loop.call_soon_threadsafe(self._update)

    def _remove_series(self, name: str) -> None:
        gauges.hide_model(name)
        telemetry.remove_model(name)
        self.on_forget(name)

    def _update(self) -> None:
        if self._announced and self.health.update(self.registry.statuses()):
            logger.info("ready")

    def _check_with(self, *, index_neurons: bool) -> SelfCheck:
        """Return a function that checks a model before it is served and stores its pace."""

        def check(model: ResidentModel) -> tuple[ResidentModel, Sequence[Guarantee]]:
            alive = partial(self.registry.alive, model.name)
            model, guarantees = checked(model)
            if all(guarantee.held for guarantee in guarantees):
                self._paces[model.name] = measured_pace(model)
                if index_neurons:
                    read_all_neurons(model, alive)
            return model, guarantees

        return check

    def reload_callers(self) -> None:
        """Read the callers' file again, if there is one."""
        if self._callers is not None:
            self._callers.reload()

    async def drain(self) -> None:
        """Refuse new requests, let admitted ones finish within the grace period, and stop."""
        for task in self._background:
            task.cancel()
        self.health.drain()
        self.registry.close()
        self._worker.refuse_new()
        await finish(self.server, self._streams, self._grace)
        USAGE.write()


def check_device(name: str) -> None:
    """Raise `OSError` if torch does not find this device on the machine."""
    if name in {"auto", "cpu"}:
        return
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise OSError(f"cannot serve: device {name!r} is not available: {reason}") from error


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
        failed = telemetry.RELOAD_FAILED.labels("callers")
        return CallersFile(settings.callers, RPCS, lambda read: failed.set(not read))
    except (OSError, ValueError) as error:
        raise OSError(f"cannot serve: {error}") from error


logger = logging.getLogger("januslens_server")


def configured(settings: ServerSettings) -> Sequence[ModelLocation]:
    """The configured models, or the embedded model."""
    return settings.models or [ModelLocation(EMBEDDED, embedded_source().location, None)]


def _stands_for_embedded(location: str) -> bool:
    return location == EMBEDDED and not Path(location).exists()


def source_maker(settings: ServerSettings) -> Callable[[ModelLocation], ModelSource]:
    """Return a function that adds the settings that all models share."""
    cache, embedded = None, embedded_source().location
    if settings.cache_dir is not None:
        cache = TensorCache(settings.cache_dir, settings.cache_size)

    def source_of(model: ModelLocation) -> ModelSource:
        return ModelSource(
            model.name,
            embedded if _stands_for_embedded(model.location) else model.location,
            model.revision,
            device=settings.device,
            data_type=settings.data_type,
            limits={memory.device: memory.size for memory in settings.max_memory},
            offload_dir=settings.offload_dir,
            cache=cache,
            row_cache_bytes=settings.row_cache,
            chunk_bytes=settings.chunk_bytes,
            lora=model.lora,
        )

    return source_of


def log_state(status: ModelStatus) -> None:
    """Log the new state of a model in one line."""
    if status.state is ModelState.FAILED:
        logger.error("model %s FAILED: %s", status.name, status.reason)
    elif status.provenance is not None and status.facts is not None:
        where, facts = status.provenance, status.facts
        logger.info(
            "model %s READY: %s, %d layers of %d, %s on %s",
            status.name,
            where.architecture,
            facts.n_layers,
            facts.d_model,
            where.data_type,
            where.device,
        )


logger = logging.getLogger("januslens_server")


def on_device_lost(
    health: Health, loop: asyncio.AbstractEventLoop, lost: asyncio.Event
) -> Callable[[], None]:
    """Return a callback for the device thread, which reports NOT_SERVING and sets `lost`.

    Only a new process can use the device again. The orchestrator starts one because of the health
    status.
    """

    def report() -> None:
        logger.critical("the device has failed; restart the server")
        loop.call_soon_threadsafe(health.drain)
        loop.call_soon_threadsafe(lost.set)

    return report


async def finish(server: grpc.aio.Server, streams: DeviceStreams, grace: float) -> None:
    """Wait up to `grace` seconds until all results are delivered, then stop the server.

    gRPC's own `stop(grace)` would also wait for every open health watch.
    """
    logger.info("draining %d requests within %g s", streams.unfinished, grace)
    finished = await streams.wait_finished(grace)
    logger.info("drained" if finished else "grace period over; aborting the remaining requests")
    # gRPC prints and logs a traceback for every call that it aborts, including health watches. So
    # discard the standard error stream; our log handler keeps the original one.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    sys.stderr = io.StringIO()
    # Leave a second for the last statuses to arrive.
    await server.stop(1.0 if finished else 0.0)

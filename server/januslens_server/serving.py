"""Composition root: settings to a running server, and signals to a drained one."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import torch
from prometheus_client import start_http_server

from januslens_server import gauges, telemetry
from januslens_server.access.directory import CallersFile
from januslens_server.access.quotas import QuotaBook
from januslens_server.config import Settings
from januslens_server.models.failures import in_service_terms
from januslens_server.models.loading import ModelSource
from januslens_server.models.registry import Registry, SelfCheck, embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.pipelines.cost import Pace, measured_pace
from januslens_server.pipelines.find_neurons import read_all_neurons
from januslens_server.pipelines.selfcheck import self_check
from januslens_server.results import Guarantee, ModelState, ModelStatus
from januslens_server.rpc.admission import Admission, Limits
from januslens_server.rpc.health import Health, is_ready
from januslens_server.rpc.methods import RPCS
from januslens_server.rpc.server import build_health_server, build_server
from januslens_server.rpc.service import IntrospectionService
from januslens_server.rpc.streaming import DeviceStreams
from januslens_server.rpc.tls import CertificateFiles
from januslens_server.scheduling.worker import DeviceWorker

logger = logging.getLogger("januslens_server")


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then let what runs finish within the grace.

    Raises `OSError` where a port cannot be had.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    loop = asyncio.get_running_loop()
    health = Health()
    worker = DeviceWorker(settings.max_waiting, in_service_terms, on_device_lost(health, loop))
    gauges.show_requests(lambda: worker.waiting, lambda: worker.in_flight)
    gauges.show_memory(settings.device)

    def observe(status: ModelStatus) -> None:
        _log_state(status)
        gauges.show_model(status)
        asyncio.run_coroutine_threadsafe(_update(health, registry), loop)

    paces: dict[str, Pace] = {}
    registry = Registry(_sources(settings), _check(settings, paces), observe)
    admission = Admission(_limits(settings), paces)
    streams = DeviceStreams(worker, settings.stall_seconds)
    quotas = QuotaBook()
    service = IntrospectionService(
        registry, admission, streams, quotas=quotas, log_prompts=settings.log_prompts
    )
    callers = _callers(settings)
    server = build_server(service, health, settings.max_connection_age_seconds, callers, quotas)
    await health.update(registry.statuses())
    for status in registry.statuses():
        gauges.show_model(status)
    lag = loop.create_task(telemetry.watch_event_loop())
    health_server = await _listen(server, health, settings)
    loading = threading.Thread(target=_load, args=(registry,), name="model-loader", daemon=True)
    loading.start()
    await _signalled(loop, callers)
    lag.cancel()
    await health.drain()
    registry.close()
    worker.refuse_new()
    await _finish(server, streams, settings.grace_seconds)
    if health_server is not None:
        await health_server.stop(0)


def on_device_lost(health: Health, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """What the device's thread calls: orchestrators then replace the process."""

    def lost() -> None:
        logger.critical("the device computes no more: nothing is served until a new start")
        asyncio.run_coroutine_threadsafe(health.drain(), loop)

    return lost


def _load(registry: Registry) -> None:
    """Load every model; from then on the garbage collector passes by what is there for good.

    Modules, vocabularies and torch's own objects are hundreds of thousands: to look through all
    of them takes a fifth of a second, which some request would wait.
    """
    registry.load_all()
    gc.collect()
    gc.freeze()


def _check(settings: Settings, paces: dict[str, Pace]) -> SelfCheck:
    """What a model goes through before it is served; its pace goes to `paces`."""

    def check(model: ResidentModel) -> Sequence[Guarantee]:
        guarantees = self_check(model)
        if all(guarantee.held for guarantee in guarantees):
            paces[model.name] = measured_pace(model)
            if settings.index_neurons:
                read_all_neurons(model)
        return guarantees

    return check


def _limits(settings: Settings) -> Limits:
    return Limits(
        seconds=settings.max_request_seconds,
        memory=settings.max_request_memory,
        stream=settings.max_request_stream,
    )


def _sources(settings: Settings) -> list[ModelSource]:
    offload_dir = settings.offload_dir
    cache = None
    if settings.cache_dir is not None:
        cache = TensorCache(Path(settings.cache_dir).expanduser(), settings.cache_size)
    named = [ModelSource(m.name, m.location, m.revision) for m in settings.models]
    return [
        replace(
            source,
            device=settings.device,
            data_type=settings.data_type,
            limits={memory.device: memory.size for memory in settings.max_memory},
            offload_dir=None if offload_dir is None else Path(offload_dir).expanduser(),
            cache=cache,
            row_cache_bytes=settings.row_cache,
            chunk_bytes=settings.chunk_bytes,
        )
        for source in named or [embedded_source()]
    ]


def _callers(settings: Settings) -> CallersFile | None:
    if settings.callers is None:
        return None
    try:
        return CallersFile(settings.callers, RPCS)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot serve: {error}") from error


async def _listen(
    server: grpc.aio.Server, health: Health, settings: Settings
) -> grpc.aio.Server | None:
    """Open all ports; gives the server of the health port, if there is to be one."""
    _check_free(settings.host, settings.port)
    _check_free(settings.metrics_host, settings.metrics_port)
    port = _add_port(server, settings)
    metrics, _ = start_http_server(settings.metrics_port, settings.metrics_host)
    health_server = await _listen_for_health(health, settings)
    await server.start()
    logger.info("serving on %s:%d", settings.host, port)
    logger.info("metrics on http://%s:%d/metrics", settings.metrics_host, metrics.server_port)
    return health_server


def _add_port(server: grpc.aio.Server, settings: Settings) -> int:
    address = f"{settings.host}:{settings.port}"
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return server.add_insecure_port(address)
    files = CertificateFiles(certificate, key, settings.tls_client_ca)
    try:
        return server.add_secure_port(address, files.credentials())
    except OSError as error:
        raise OSError(f"cannot serve: {error}") from error


async def _listen_for_health(health: Health, settings: Settings) -> grpc.aio.Server | None:
    if settings.health_port is None:
        return None
    _check_free(settings.host, settings.health_port)
    server = build_health_server(health)
    port = server.add_insecure_port(f"{settings.host}:{settings.health_port}")
    await server.start()
    logger.info("health on %s:%d", settings.host, port)
    return server


def _check_free(host: str, port: int) -> None:
    """Say in one line what keeps a port from being had; gRPC's core logs lines of its own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as error:
        raise OSError(f"cannot serve: {error.strerror}") from error


def _log_state(status: ModelStatus) -> None:
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


async def _update(health: Health, registry: Registry) -> None:
    statuses: Sequence[ModelStatus] = registry.statuses()
    await health.update(statuses)
    if is_ready(statuses):
        logger.info("ready")


async def _signalled(loop: asyncio.AbstractEventLoop, callers: CallersFile | None) -> None:
    """Until the process is to end; SIGHUP reads the callers anew."""
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, (lambda: None) if callers is None else callers.reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


async def _finish(server: grpc.aio.Server, streams: DeviceStreams, grace: float) -> None:
    """Let what runs be computed and read, then stop.

    We count our own requests: `stop(grace)` would wait for every open health watch.
    """
    logger.info("draining %d requests, for at most %g s", streams.unfinished, grace)
    finished = await streams.wait_finished(grace)
    logger.info("drained" if finished else "grace expired, cutting what still runs")
    # gRPC logs and prints a traceback for every call that it cuts, an open health watch too; the
    # log keeps the stream that it has.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    sys.stderr = io.StringIO()
    # The last statuses are on their way to their readers.
    await server.stop(1.0 if finished else 0.0)

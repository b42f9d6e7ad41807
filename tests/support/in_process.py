"""A server in the test's own process, so that tests can make its model and device fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from torch import nn

from januslens.v1 import service_pb2_grpc
from januslens_server.access.callers import Caller
from januslens_server.access.directory import OpenDirectory
from januslens_server.access.quotas import QuotaBook
from januslens_server.models.failures import service_error
from januslens_server.models.registry import Registry, embedded_source
from januslens_server.pipelines.cost import Pace, measured_pace
from januslens_server.pipelines.self_check import checked
from januslens_server.rpc.admission import Admission, Limits
from januslens_server.rpc.health import Health
from januslens_server.rpc.server import build_server
from januslens_server.rpc.service import IntrospectionService
from januslens_server.rpc.streaming import DeviceStreams
from januslens_server.scheduling.worker import DeviceWorker
from tests.support.calls import Refusal

GENEROUS = Limits(seconds=600.0, memory=2**40, stream=2**40)


@dataclass(frozen=True)
class Loaded:
    """The embedded model, loaded, with its pace."""

    registry: Registry
    paces: dict[str, Pace]

    @property
    def network(self) -> nn.Module:
        return self.registry.get("demo").network


def loaded() -> Loaded:
    registry = Registry([embedded_source()], checked, lambda _: None)
    registry.load_all()
    return Loaded(registry, {"demo": measured_pace(registry.get("demo"))})


@dataclass(frozen=True)
class OneCaller:
    """Attributes every request to the same caller."""

    known: Caller

    def caller(self, _token: str | None) -> Caller:
        return self.known


@asynccontextmanager
async def served(
    demo: Loaded,
    limits: Limits = GENEROUS,
    max_waiting: int = 64,
    translate: Callable[[Exception], Exception] = service_error,
    on_loss: Callable[[], None] = lambda: None,
    caller: Caller | None = None,
    quotas: QuotaBook | None = None,
) -> AsyncIterator[Any]:
    """Yield the stub of a server on loopback; check at the end that no request is left.

    All requests are from `caller`, and count against `quotas`.
    """
    worker = DeviceWorker(max_waiting, translate, on_loss)
    streams = DeviceStreams(worker, stall_seconds=60, max_unread=2**30)
    admission = Admission(limits, demo.paces, worker.fits_alone)
    quotas = quotas or QuotaBook()
    service = IntrospectionService(demo.registry, admission, streams, quotas=quotas)
    directory = OpenDirectory() if caller is None else OneCaller(caller)
    server = build_server(service, Health(), directory=directory, quotas=quotas)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield service_pb2_grpc.IntrospectionServiceStub(channel)
    await server.stop(0)
    async with asyncio.timeout(5):
        while worker.unfinished:  # noqa: ASYNC110 - its thread sets no asyncio event
            await asyncio.sleep(0.01)
    assert hooks_of(demo.network) == 0


@contextmanager
def broken(module: nn.Module, fail: Callable[..., Any]) -> Iterator[None]:
    """Call `fail` whenever a module has run; its return value replaces the module's output."""
    handle = module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


async def refused(call: Any) -> Refusal:
    """Return the error of a unary or streaming call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (_all_of(call) if hasattr(call, "__aiter__") else call)
    error = caught.value
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    headers = dict(await call.initial_metadata())
    return Refusal(error.code(), error.details() or "", status, headers.get("x-request-id"))


async def _all_of(stream: Any) -> list[Any]:
    return [message async for message in stream]


def hooks_of(network: nn.Module) -> int:
    """Return the hooks that are registered now."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()
    )

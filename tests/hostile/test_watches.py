"""Health.Watch needs no token: no watcher delays another or the drain, and numbers are bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens.v1 import models_pb2
from januslens_server.results import ModelState, ModelStatus
from januslens_server.rpc.health import MAX_NAME_BYTES, Health, build_health_server
from tests.hostile.raw_peer import HEALTH, RawPeer, framed
from tests.support.calls import long_trace, refused, started
from tests.support.server import running_server

WATCH = HEALTH + "Watch"
SERVING, NOT_SERVING = (
    framed(health_pb2.HealthCheckResponse(status=status).SerializeToString()) for status in (1, 2)
)
SERVICES = ("", "januslens.ready", "demo")
RESOURCE_EXHAUSTED = str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])


def asked(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def test_stalled_watchers_delay_neither_others_nor_the_drain() -> None:
    with (
        running_server("--grace-seconds", "5") as server,
        RawPeer(server.address, window=0) as stalled,
        RawPeer(server.address) as reading,
        grpc.insecure_channel(server.address) as channel,
    ):
        for service in SERVICES:
            stalled.call(WATCH, asked(service))
        stalled.pump(0.2)
        watches = [reading.call(WATCH, asked(service)) for service in SERVICES]
        assert [reading.wait(stream) for stream in watches] == [SERVING] * 3
        running = started(channel, "Trace", long_trace(40))  # holds the drain for the grace
        next(running)
        began = time.monotonic()
        server.process.terminate()
        both = len(SERVING + NOT_SERVING)
        assert [reading.wait(stream, both) for stream in watches] == [SERVING + NOT_SERVING] * 3
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert {health.Check(asked(service)).status for service in SERVICES} == {2}
        answer = refused(channel, "Tokenize", models_pb2.TokenizeRequest(text="Japan"))
        assert answer.reason == "SERVER_DRAINING"
        assert time.monotonic() - began < 4  # before the grace is over
        assert server.process.wait(20) == 0
        running.cancel()
    assert "Traceback" not in server.log


@asynccontextmanager
async def served(health: Health) -> AsyncIterator[str]:
    server = build_health_server(health)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_open_watches_are_bounded_in_all_and_by_address() -> None:
    async with served(Health(max_watches=4)) as address:
        await asyncio.to_thread(fill_all_places, address)


def fill_all_places(address: str) -> None:
    with RawPeer(address) as first, RawPeer(address, source="127.0.0.2") as second:
        for peer in (first, second):
            streams = [peer.call(WATCH, asked()) for _ in range(3)]
            assert [peer.wait(stream) for stream in streams] == [SERVING, SERVING, b""]
            assert (peer.ended(streams[2]) or {})["grpc-status"] == RESOURCE_EXHAUSTED
        with RawPeer(address, source="127.0.0.3") as third:
            assert (third.ended(third.call(WATCH, asked())) or {})["grpc-status"] == (
                RESOURCE_EXHAUSTED
            )
            check = third.call(HEALTH + "Check", asked())
            assert third.wait(check) == SERVING
            second.http2.reset_stream(1)
            second.flush()
            second.pump(0.3)
            assert third.wait(third.call(WATCH, asked())) == SERVING


async def test_a_watcher_that_does_not_read_loses_its_place() -> None:
    async with served(Health(max_watches=2, stall_seconds=2)) as address:
        await asyncio.to_thread(stall_then_watch, address)


def stall_then_watch(address: str) -> None:
    with RawPeer(address, window=0) as stalled, RawPeer(address) as reading:
        stalled.call(WATCH, asked())
        stalled.pump(0.3)
        first = reading.ended(reading.call(WATCH, asked())) or {}
        assert first["grpc-status"] == RESOURCE_EXHAUSTED
        deadline = time.monotonic() + 20
        while reading.wait(reading.call(WATCH, asked())) != SERVING:
            assert time.monotonic() < deadline


@contextmanager
def stub(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_long_names_are_refused(method: str) -> None:
    def call(address: str) -> tuple[grpc.StatusCode, str]:
        with stub(address) as health:
            answer = getattr(health, method)
            try:
                found = answer(asked("x" * (MAX_NAME_BYTES + 1)), timeout=5)
                next(found)
            except grpc.RpcError as error:
                return error.code(), error.details() or ""
        raise AssertionError("expected a refusal")

    async with served(Health()) as address:
        code, text = await asyncio.to_thread(call, address)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"expected at most {MAX_NAME_BYTES} bytes" in text


async def test_a_watcher_gets_every_change_and_unknown_services_once_they_exist() -> None:
    health = Health()
    async with served(health) as address, grpc.aio.insecure_channel(address) as channel:
        asking: Any = health_pb2_grpc.HealthStub(channel)
        watch = asking.Watch(asked("late"))
        statuses = [(await watch.read()).status]
        for state in (ModelState.LOADING, ModelState.READY):
            health.update([ModelStatus("late", state)])
            statuses.append((await watch.read()).status)
        health.drain()
        health.update([ModelStatus("late", ModelState.READY)])
        statuses.append((await watch.read()).status)
        assert statuses == [3, 2, 1, 2]  # SERVICE_UNKNOWN, NOT_SERVING, SERVING, NOT_SERVING
        watch.cancel()


async def test_all_ready_needs_every_model() -> None:
    health = Health()
    failed = ModelStatus("broken", ModelState.FAILED)
    async with served(health) as address, grpc.aio.insecure_channel(address) as channel:
        asking: Any = health_pb2_grpc.HealthStub(channel)
        for other, expected in ((ModelState.FAILED, 2), (ModelState.READY, 1)):
            health.update([ModelStatus("good", ModelState.READY), replace(failed, state=other)])
            assert (await asking.Check(asked("januslens.ready"))).status == 1
            assert (await asking.Check(asked("januslens.all-ready"))).status == expected

"""What peers without a token can make the server hold is bounded, and others are served."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from januslens.v1 import common_pb2, models_pb2, service_pb2_grpc, trace_pb2
from januslens_server.rpc.reception import AT_ONCE, OF_ONE_CALLER
from tests.hostile.raw_peer import HEALTH, RawPeer, framed
from tests.support.calls import SERVICE
from tests.support.memory import open_files, resident_bytes
from tests.support.server import ServerProcess, running_server

CONNECTIONS, STREAMS = 40, 20
METHOD = SERVICE + "Tokenize"
# Resident memory that an attack may add, including memory that the allocator keeps.
MEMORY = 200 * 2**20
# The messages that are received at once, and the same amount for allocator and windows.
HALF_SENT_MEMORY = 2 * AT_ONCE * 4 * 2**20
# Eight requests that one address may send at once, of 0.5 MiB each, and 11 MiB when decoded.
WHOLE_MEMORY = OF_ONE_CALLER * 24 * 2**20
# Health responds within 50 ms on an idle machine; tests share the machine with others.
HEALTH_SECONDS = 2.0


@pytest.fixture(scope="module")
def limited() -> Iterator[ServerProcess]:
    flags = ["--max-connections", str(CONNECTIONS), "--max-streams", str(STREAMS)]
    with running_server(*flags, "--health-port", "0") as server:
        yield server


def threads(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


@pytest.fixture
def held(limited: ServerProcess) -> Iterator[None]:
    """Check that others are served during and after the attack, and that its memory is bounded."""
    with grpc.insecure_channel(limited.address) as channel:
        served(channel)
        memory, files, running = (
            resident_bytes(limited.process.pid),
            open_files(limited.process.pid),
            threads(limited),
        )
        yield
        served(channel)
        assert resident_bytes(limited.process.pid) - memory < MEMORY
        assert open_files(limited.process.pid) - files <= CONNECTIONS + 10
        assert threads(limited) - running < 20
    assert "Traceback" not in limited.log


def served(channel: grpc.Channel) -> None:
    began = time.monotonic()
    check: Any = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    assert check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
    assert time.monotonic() - began < HEALTH_SECONDS
    stub = service_pb2_grpc.IntrospectionServiceStub(channel)
    assert stub.Tokenize(models_pb2.TokenizeRequest(text="Japan"), timeout=10).tokens


@pytest.mark.usefixtures("held")
def test_idle_connections_are_bounded_and_leave_the_health_port_free(
    limited: ServerProcess,
) -> None:
    host, _, port = limited.address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(10 * CONNECTIONS):
            stack.enter_context(socket.create_connection((host, int(port)), 10))
        time.sleep(0.5)
        assert open_files(limited.process.pid) < CONNECTIONS + 60
        with grpc.insecure_channel(limited.health_address) as channel:
            check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
            assert check(b"", timeout=10) == b"\x08\x01"
    time.sleep(0.5)


@pytest.mark.usefixtures("held")
def test_open_calls_of_a_connection_are_bounded(limited: ServerProcess) -> None:
    with RawPeer(limited.address) as peer:
        assert peer.http2.remote_settings.max_concurrent_streams == STREAMS
        # Further calls of a peer that ignores the setting are refused.
        peer.http2.remote_settings.max_concurrent_streams = 10**6
        peer.http2.remote_settings.acknowledge()
        for _ in range(50 * STREAMS):
            peer.headers(METHOD)
        peer.flush()
        peer.pump(1)
        assert peer.closed or len(peer.reset | peer.trailers.keys()) >= 49 * STREAMS


@pytest.mark.usefixtures("held")
def test_rapid_resets_use_bounded_memory(limited: ServerProcess) -> None:
    with RawPeer(limited.address) as peer:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and not peer.closed:
            for _ in range(STREAMS // 2):
                peer.http2.reset_stream(peer.headers(METHOD))
            peer.flush()
            peer.pump(0.001)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


WINDOW_UPDATE = frame(8, 0, 0, (1).to_bytes(4, "big"))
PING = frame(6, 0, 0, bytes(8))
SETTINGS = frame(4, 0, 0, b"")
LONG_HEADER = b"\x40\x03x-a\x7f\x99\x07" + b"y" * 1000


@pytest.mark.parametrize(
    "flood",
    [
        WINDOW_UPDATE * 1000,
        PING * 1000,
        SETTINGS * 1000,
        frame(1, 0, 1, b"") + frame(9, 0, 1, LONG_HEADER) * 1000,
    ],
    ids=["window updates of one byte", "pings", "settings", "headers without an end"],
)
@pytest.mark.usefixtures("held")
def test_floods_of_frames_use_bounded_memory(limited: ServerProcess, flood: bytes) -> None:
    with RawPeer(limited.address, reads=False) as peer:
        peer._socket.settimeout(0.2)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not peer.closed:
            peer.raw(flood)


@pytest.mark.usefixtures("held")
def test_half_sent_messages_use_bounded_memory(limited: ServerProcess) -> None:
    """Only the few that are received at once may use memory for a whole message."""
    before = resident_bytes(limited.process.pid)
    with ExitStack() as stack:
        for _ in range(CONNECTIONS // 4):
            peer = stack.enter_context(RawPeer(limited.address, reads=False))
            for _ in range(STREAMS // 2):
                send_most(peer, peer.headers(METHOD))
        assert resident_bytes(limited.process.pid) - before < HALF_SENT_MEMORY


def test_a_half_sent_message_is_refused_while_others_wait(limited: ServerProcess) -> None:
    with ExitStack() as stack:
        peer = stack.enter_context(RawPeer(limited.address))
        streams = [peer.headers(METHOD) for _ in range(OF_ONE_CALLER + 1)]
        for stream in streams:
            send_most(peer, stream)
        trailers = peer.ended(streams[0], seconds=30)
        assert trailers is not None
        assert trailers["grpc-status"] == str(grpc.StatusCode.ABORTED.value[0])
        assert trailers["grpc-message"].startswith("the request was not received within 2 s")


def test_half_sent_messages_of_one_address_do_not_delay_another(limited: ServerProcess) -> None:
    with ExitStack() as stack:
        peer = stack.enter_context(RawPeer(limited.address, source="127.0.0.9"))
        for _ in range(2 * OF_ONE_CALLER):
            send_most(peer, peer.headers(METHOD))
        channel = stack.enter_context(grpc.insecure_channel(limited.address))
        served(channel)


def test_half_sent_health_checks_from_many_addresses_do_not_delay_health(
    limited: ServerProcess,
) -> None:
    """More checks stall than requests are received at once, each from another address."""
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(limited.address))
        served(channel)
        for number in range(CONNECTIONS // 2):
            peer = stack.enter_context(RawPeer(limited.address, source=f"127.0.1.{number + 1}"))
            for _ in range(STREAMS // 2):
                stream = peer.headers(HEALTH + "Check")
                peer.send(stream, b"\0" + (10_000).to_bytes(4, "big") + b"x")
        served(channel)


def test_a_call_without_a_message_is_refused(limited: ServerProcess) -> None:
    with RawPeer(limited.address) as peer:
        stream = peer.headers(METHOD, end=True)
        peer.flush()
        trailers = peer.ended(stream)
        assert trailers is not None
        assert trailers["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])


def send_most(peer: RawPeer, stream: int, seconds: float = 0.1) -> None:
    """Send as much of a message of 4 MiB as the server accepts, but not its end."""
    size = 4 * 2**20 - 100
    with suppress(TimeoutError):
        peer.send(stream, b"\0" + size.to_bytes(4, "big") + bytes(size - 1000), seconds=seconds)


@pytest.mark.usefixtures("held")
def test_readers_that_never_read_use_bounded_memory(limited: ServerProcess) -> None:
    with ExitStack() as stack:
        for _ in range(CONNECTIONS // 2):
            peer = stack.enter_context(RawPeer(limited.address, window=0))
            for _ in range(STREAMS // 2):
                peer.call(METHOD, models_pb2.TokenizeRequest(text="Japan"))


def test_whole_large_requests_use_bounded_memory_and_do_not_delay_another_address(
    limited: ServerProcess,
) -> None:
    """Each has as many token ids as a request may have, 20 times as large once decoded."""
    ids = common_pb2.TokenIds(ids=[1000] * (2**18))
    request = trace_pb2.TraceRequest(input=common_pb2.Input(token_ids=ids))
    before = resident_bytes(limited.process.pid)
    with ExitStack() as stack:
        for _ in range(2):
            peer = stack.enter_context(RawPeer(limited.address, source="127.0.0.9"))
            for _ in range(OF_ONE_CALLER // 2):
                stream = peer.headers(SERVICE + "Trace")
                with suppress(TimeoutError):
                    peer.send(stream, framed(request.SerializeToString()), end=True, seconds=0.5)
        channel = stack.enter_context(grpc.insecure_channel(limited.address))
        served(channel)
        assert resident_bytes(limited.process.pid) - before < WHOLE_MEMORY
    assert "Traceback" not in limited.log

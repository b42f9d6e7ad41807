"""Attacks on the wire: health answers, other callers are served, memory is bounded.

Prints what each attack costs: the latency of health checks (median, 99 % and longest) beside that
of a plain health server, and memory, descriptors and threads.
"""

from __future__ import annotations

import socket
import ssl
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import yaml

from januslens.v1 import (
    common_pb2,
    intervene_pb2,
    interventions_pb2,
    lens_pb2,
    models_pb2,
    sites_pb2,
    trace_pb2,
)
from januslens_server.access.callers import new_token, token_hash
from tests.hostile.raw_peer import RawPeer
from tests.hostile.test_connections import LONG_HEADER, METHOD, WINDOW_UPDATE, frame
from tests.support.calls import SERVICE, long_trace, prompt, started
from tests.support.certificates import server_files, trusting
from tests.support.health_checks import health_checked
from tests.support.members import members
from tests.support.server import ServerProcess, running_server

CONNECTIONS, STREAMS = 60, 20
LIMITS = ("--max-connections", str(CONNECTIONS), "--max-streams", str(STREAMS))
SECONDS = 4.0
# Memory that one attack may add to each process: an unread stream holds up to 18 MiB in queues, in
# messages that are being written, in gRPC's buffers and in its pipeline.
MEMORY = 50 * 20 * 2**20
# The attackers use the same cores as the server.
MEDIAN_SECONDS, LONGEST_SECONDS = 0.05, 5.0
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Target:
    """A server, and how an authorised caller connects to it."""

    name: str
    server: ServerProcess
    token: str | None
    tls: ssl.SSLContext | None
    credentials: grpc.ChannelCredentials | None
    model: str = "demo"

    @property
    def text(self) -> models_pb2.TokenizeRequest:
        return models_pb2.TokenizeRequest(model=self.model, text="The capital of Japan")

    def trace(self, n_positions: int) -> trace_pb2.TraceRequest:
        request = long_trace(n_positions)
        request.model = self.model
        return request

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def channel(self) -> grpc.Channel:
        if self.credentials is None:
            return grpc.insecure_channel(self.server.address, OWN_CONNECTION)
        return grpc.secure_channel(self.server.address, self.credentials, OWN_CONNECTION)

    def peer(self, **options: Any) -> RawPeer:
        return RawPeer(self.server.address, tls=self.tls, **options)

    def processes(self) -> list[int]:
        return members(self.server) or [self.server.process.pid]

    def held(self) -> tuple[int, int, int]:
        """Return resident bytes, descriptors and threads of all processes that serve."""
        roots = [Path("/proc") / str(pid) for pid in self.processes()]
        pages = sum(int((root / "statm").read_text().split()[1]) for root in roots)
        files, threads = (
            sum(len(list((root / kind).iterdir())) for root in roots) for kind in ("fd", "task")
        )
        return 4096 * pages, files, threads


@pytest.fixture(scope="module", params=["open", "tokens", "TLS", "processes"])
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("server")
    flags = [*LIMITS, "--health-port", "0"]
    token = tls = credentials = None
    if request.param != "open":
        token = new_token()
        caller = {"name": "ada", "tokens": [{"sha256": token_hash(token).hex()}]}
        (folder / "callers.yaml").write_text(yaml.safe_dump({"callers": [caller]}))
        flags += ["--callers", str(folder / "callers.yaml")]
    if request.param == "TLS":
        authority = trustme.CA()
        flags += server_files(authority, folder).flags
        credentials, tls = trusting(authority), ssl.create_default_context()
        authority.configure_trust(tls)
        tls.set_alpn_protocols(["h2"])
    if request.param == "processes":
        flags += ["--processes", "2"]
    with running_server(*flags, seconds=180) as server:
        yield Target(request.param, server, token, tls, credentials)
    assert "Traceback" not in server.log


def idle_connections(target: Target) -> None:
    host, _, port = target.server.address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection((host, int(port)), 10))
        time.sleep(SECONDS)


def half_open_connections(target: Target) -> None:
    with ExitStack() as stack:
        for _ in range(CONNECTIONS // 2):
            peer = stack.enter_context(target.peer())
            peer.headers(METHOD, token=target.token)
            peer.flush()
            peer._socket.shutdown(socket.SHUT_WR)
        time.sleep(SECONDS)


def rapid_resets(target: Target) -> None:
    with target.peer() as peer:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and not peer.closed:
            for _ in range(STREAMS // 2):
                peer.http2.reset_stream(peer.headers(METHOD, token=target.token))
            peer.flush()
            peer.pump(0.001)


def flood(data: bytes) -> Callable[[Target], None]:
    def attack(target: Target) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with target.peer(reads=False) as peer:  # again, whenever the server closes it
                peer._socket.settimeout(0.2)
                while time.monotonic() < deadline and not peer.closed:
                    peer.raw(data)

    return attack


def half_sent_messages(target: Target) -> None:
    size = 4 * 2**20 - 100
    with ExitStack() as stack:
        for _ in range(40):
            peer = stack.enter_context(target.peer(reads=False))
            stream = peer.headers(METHOD, token=target.token)
            peer.send(stream, b"\0" + size.to_bytes(4, "big") + bytes(size - 1000))
        time.sleep(SECONDS)


def readers_that_never_read(target: Target) -> None:
    with ExitStack() as stack:
        for _ in range(50):
            peer = stack.enter_context(target.peer(window=0))
            peer.call(SERVICE + "Trace", target.trace(20), target.token)
        time.sleep(SECONDS)


def unary_flood(target: Target) -> None:
    """Keep a hundred calls open, with a wrong token if tokens are used, beside a stream."""
    stop = threading.Event()
    metadata = () if target.token is None else (("authorization", "Bearer wrong"),)

    def call_until_stopped() -> None:
        with target.channel() as channel:
            while not stop.is_set():
                calls = [
                    started(channel, "Tokenize", target.text, metadata=metadata) for _ in range(25)
                ]
                for call in calls:
                    call.exception(timeout=30)

    threads = [threading.Thread(target=call_until_stopped) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with target.channel() as channel:
            began = time.monotonic()
            while time.monotonic() - began < SECONDS:
                stream = started(channel, "Trace", target.trace(8), metadata=target.metadata)
                assert list(stream)[-1].HasField("summary")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def token_ids() -> tuple[str, Any]:
    """A trace with nearly as many token ids as a request may have."""
    ids = common_pb2.TokenIds(ids=[1000] * 250_000)
    return "Trace", trace_pb2.TraceRequest(input=common_pb2.Input(token_ids=ids))


def experiments() -> tuple[str, Any]:
    """As many experiments as a request may have, each with 256 interventions of all."""
    noise = interventions_pb2.Intervention(
        site=sites_pb2.SITE_BLOCK_OUTPUT,
        noise=interventions_pb2.Noise(standard_deviation=1.0, seed=1),
    )
    zero = interventions_pb2.Intervention(site=sites_pb2.SITE_BLOCK_OUTPUT, zero=True)
    one = intervene_pb2.Experiment(interventions=[zero])
    return "Intervene", intervene_pb2.InterveneRequest(
        input=prompt("Japan"), always=[noise] * 256, experiments=[one] * 16_384
    )


def unknown_fields() -> tuple[str, Any]:
    """A trace with a million fields that the contract does not have."""
    request = trace_pb2.TraceRequest(input=prompt("Japan"))
    request.MergeFromString(b"\xf8\x07\x00" * 1_000_000)
    return "Trace", request


def tensors() -> tuple[str, Any]:
    """An Intervene whose experiments set 4 MB of values in all."""
    values = common_pb2.Tensor(data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[128], data=bytes(512))
    setting = interventions_pb2.Intervention(site=sites_pb2.SITE_BLOCK_OUTPUT, set=values)
    experiment = intervene_pb2.Experiment(interventions=[setting])
    return "Intervene", intervene_pb2.InterveneRequest(
        input=prompt("Japan"), experiments=[experiment] * 7000
    )


def long_text() -> tuple[str, Any]:
    """A text that the tokenizer splits into as many tokens as a response may have."""
    return "Tokenize", models_pb2.TokenizeRequest(text="a b c d " * 8000)


def vectors() -> tuple[str, Any]:
    """As many vectors as a request may have, with as many tokens as it may list."""
    values = common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32,
        shape=[4096, 128],
        data=array("f", range(4096 * 128)).tobytes(),
    )
    return "Project", lens_pb2.ProjectRequest(vectors=values, top_k=8, bottom_k=8)


def large_requests(build: Callable[[], tuple[str, Any]]) -> Callable[[Target], None]:
    """Keep sixteen large requests open, each of which is cancelled in the end."""

    def attack(target: Target) -> None:
        method, request = build()
        request.model = target.model
        deadline = time.monotonic() + SECONDS
        with target.channel() as channel:
            while (left := deadline - time.monotonic()) > 0:
                calls = [
                    started(channel, method, request, metadata=target.metadata, timeout=left)
                    for _ in range(16)
                ]
                for call in calls:
                    call.exception()

    return attack


ATTACKS = {
    "idle connections": idle_connections,
    "half-open connections": half_open_connections,
    "rapid resets": rapid_resets,
    "window updates": flood(WINDOW_UPDATE * 1000),
    "endless headers": flood(frame(1, 0, 1, b"") + frame(9, 0, 1, LONG_HEADER) * 1000),
    "half-sent messages": half_sent_messages,
    "readers that never read": readers_that_never_read,
    "unary flood": unary_flood,
    "token ids": large_requests(token_ids),
    "experiments": large_requests(experiments),
    "unknown fields": large_requests(unknown_fields),
    "tensors": large_requests(tensors),
    "long texts": large_requests(long_text),
    "vectors": large_requests(vectors),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_health_and_other_callers_are_served_during_an_attack(
    target: Target, attack: Callable[[Target], None], request: pytest.FixtureRequest
) -> None:
    memory, files, threads = target.held()
    served(target)
    with health_checked(target.server.health_address) as checks:
        attacking = threading.Thread(target=attack, args=(target,))
        attacking.start()
        peaks = [target.held()]
        while attacking.is_alive():
            peaks.append(target.held())
            time.sleep(0.1)
    served(target)
    most = [max(held) for held in zip(*peaks, strict=True)]
    added = (most[0] - memory, most[1] - files, most[2] - threads)
    print(
        f"{request.node.callspec.id}: {checks}; {added[0] / 2**20:+.0f} MiB, "
        f"{added[1]:+} files, {added[2]:+} threads"
    )
    assert statistics.median(checks.own) < MEDIAN_SECONDS
    assert max(checks.own) < LONGEST_SECONDS
    count = len(target.processes())
    assert added[0] < MEMORY * count
    assert added[1] <= (CONNECTIONS + 20) * count
    assert added[2] < 40 * count


def served(target: Target) -> None:
    """Check that the server answers a caller on a new connection."""
    with target.channel() as channel:
        call = started(
            channel,
            "Tokenize",
            target.text,
            metadata=target.metadata,
            timeout=20,
            wait_for_ready=True,
        )
        assert call.result().tokens

"""TLS, client certificates, and certificates that change while the server runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

import januslens
from januslens.v1 import models_pb2, service_pb2_grpc
from januslens_server.config import read_settings
from januslens_server.rpc.tls import CertificateFiles
from januslens_server.serving.assembly import serve
from tests.support.calls import SERVICE
from tests.support.certificates import (
    ServerFiles,
    replace,
    replace_certificate,
    server_files,
    showing,
    trusting,
)
from tests.support.metrics import sample
from tests.support.server import ServerProcess, running_server

TOKENIZE = models_pb2.TokenizeRequest(text="The capital of Japan")
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> ServerFiles:
    return server_files(authority, tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def mutual(files: ServerFiles) -> Iterator[ServerProcess]:
    """A server with mutual TLS and a plaintext health port."""
    with running_server(*files.mutual_flags, "--health-port", "0") as server:
        yield server


@pytest.fixture
def secured(files: ServerFiles) -> Iterator[ServerProcess]:
    with running_server(*files.flags) as server:
        yield server


def test_client_explains_a_connection_that_fails_because_of_tls(
    secured: ServerProcess, server: ServerProcess
) -> None:
    trusting_others = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
    metrics = server.metrics_url.removeprefix("http://").removesuffix("/metrics")
    for address, credentials, advice in (
        (metrics, None, "give the server's gRPC port, not that of its metrics"),
        (secured.address, None, "the server may require TLS"),
        (secured.address, trusting_others, "certificate is not trusted; set root_certificates"),
        (server.address, trusting_others, "the server does not use TLS"),
    ):
        with (
            januslens.Client(address, credentials=credentials, timeout=60) as client,
            pytest.raises(januslens.Unavailable, match=advice),
        ):
            client.tokenize("The capital")


def tokenize(address: str, credentials: grpc.ChannelCredentials | None) -> int:
    """The number of tokens of a text, over a new connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.insecure_channel(address, options)
        if credentials is None
        else grpc.secure_channel(address, credentials, options)
    )
    with channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        return len(stub.Tokenize(TOKENIZE, timeout=20).tokens)


def test_a_caller_with_a_certificate_is_served(
    mutual: ServerProcess, authority: trustme.CA
) -> None:
    assert tokenize(mutual.address, showing(authority, "ada", authority)) > 0


@pytest.mark.parametrize("who", ["nobody", "a stranger", "plaintext"])
def test_clients_without_a_valid_certificate_are_refused(
    mutual: ServerProcess, authority: trustme.CA, who: str
) -> None:
    credentials = {
        "nobody": trusting(authority),
        "a stranger": showing(authority, "eve", trustme.CA()),
        "plaintext": None,
    }[who]
    with pytest.raises(grpc.RpcError) as refused:
        tokenize(mutual.address, credentials)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_health_port_serves_health_only(mutual: ServerProcess) -> None:
    with grpc.insecure_channel(mutual.health_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="januslens.ready")
        assert stub.Check(request, timeout=20).status == SERVING
        for method in (SERVICE + "Tokenize", "/grpc.reflection.v1alpha.ServerReflection/Nope"):
            call: Any = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError) as refused:
                call(TOKENIZE.SerializeToString(), timeout=20)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def shown_serial(address: str) -> int:
    """The server's certificate on a new connection."""
    host, _, port = address.rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)), timeout=20)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def serial_in(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def test_certificates_rotate_under_load_without_a_failure(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """The authority is replaced, too; clients trust both meanwhile."""
    files, successor = server_files(authority, tmp_path), trustme.CA()
    credentials = trusting(authority, successor)
    with running_server(*files.flags) as server:
        stop, failures, served = threading.Event(), [], []

        def ask() -> None:
            while not stop.is_set():
                try:
                    served.append(tokenize(server.address, credentials))
                except grpc.RpcError as error:
                    failures.append(error)

        callers = [threading.Thread(target=ask) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            shown = {shown_serial(server.address)}
            for issuer in [authority, successor] * 4:
                replace_certificate(files, issuer)
                shown.add(shown_serial(server.address))
                assert serial_in(files.certificate) in shown
                time.sleep(0.2)
        finally:
            stop.set()
            for caller in callers:
                caller.join()
    assert failures == []
    assert len(shown) == 9
    assert len(served) > 50


class AlwaysChanged(CertificateFiles):
    """Files that have changed at each handshake, and that take no time to read."""

    def _stamp(self) -> list[tuple[int, int, int]]:
        return [(time.monotonic_ns(), 0, 0)]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        return self._configuration

    @cached_property
    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        return super()._read()


def serve_always_changed(files: ServerFiles, connection: Connection) -> None:
    async def served() -> None:
        server = grpc.aio.server()
        credentials = AlwaysChanged(files.certificate, files.key, None).credentials()
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        connection.send(port)
        await asyncio.to_thread(connection.recv)
        await server.stop(None)

    asyncio.run(served())


def test_files_that_change_at_each_handshake_do_not_end_the_server(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """gRPC frees the state of the old files while other handshakes may use it."""
    files, (ours, theirs) = server_files(authority, tmp_path), Pipe()
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    # A process of its own, because the fault is a crash.
    server = get_context("spawn").Process(target=serve_always_changed, args=(files, theirs))
    server.start()
    port, until = ours.recv(), time.monotonic() + 3

    def connect() -> int:
        done = 0
        while time.monotonic() < until:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted,
            ):
                assert encrypted.selected_alpn_protocol() == "h2"
                done += 1
        return done

    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(connect) for _ in range(8)]
    ours.send(None)
    server.join(20)
    assert server.exitcode == 0
    assert sum(caller.result() for caller in callers) > 8


def test_a_certificate_without_its_key_leaves_the_last_pair_in_use(
    authority: trustme.CA, tmp_path: Path
) -> None:
    files = server_files(authority, tmp_path)
    before, key = serial_in(files.certificate), files.key.read_bytes()
    with running_server(*files.flags) as server:
        replace(files.key, trustme.CA().issue_cert("127.0.0.1").private_key_pem.bytes())
        assert shown_serial(server.address) == before
        files.key.unlink()
        assert shown_serial(server.address) == before
        assert tokenize(server.address, trusting(authority)) > 0
        assert sample(server, "januslens_reload_failed", file="certificate") == 1
        replace(files.key, key)
        replace_certificate(files, authority)
        assert shown_serial(server.address) == serial_in(files.certificate) != before
        server.wait_for("certificate not reloaded: ")
        server.wait_for("certificate reloaded")
        assert sample(server, "januslens_reload_failed", file="certificate") == 0
        expiry = "januslens_certificate_expiry_timestamp_seconds"
        (leaf, *_) = x509.load_pem_x509_certificates(files.certificate.read_bytes())
        assert sample(server, expiry, file="certificate") == leaf.not_valid_after_utc.timestamp()


@pytest.mark.parametrize("broken", ["certificate", "key", "client_ca"])
def test_invalid_certificate_files_end_the_server_with_one_line(
    authority: trustme.CA, tmp_path: Path, broken: str
) -> None:
    files = server_files(authority, tmp_path)
    replace(getattr(files, broken), b"no certificate\n")
    settings = read_settings(["--port", "0", "--metrics-port", "0", *files.mutual_flags])
    with pytest.raises(OSError, match=f"cannot serve: .*{getattr(files, broken).name}"):
        asyncio.run(serve(settings))

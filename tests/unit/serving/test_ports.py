"""Check and reserve ports, with real sockets."""

from __future__ import annotations

import socket

import pytest

from januslens_server.serving.ports import check_port_free, reserve_port

HOST = "127.0.0.1"


def listening(port: int, *, shared: bool) -> socket.socket:
    """A listening socket with the options of gRPC's core."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    try:
        server.bind((HOST, port))
    except OSError:
        server.close()
        raise
    server.listen()
    return server


def test_a_reserved_port_is_refused_before_anything_listens() -> None:
    with reserve_port(HOST, 0) as port:
        with pytest.raises(OSError, match=f"cannot serve: Address already in use .*{port}"):
            check_port_free(HOST, port)
        with pytest.raises(OSError, match=f"cannot serve: Address already in use .*{port}"):
            reserve_port(HOST, port).__enter__()
        with pytest.raises(OSError, match="Address already in use"):
            listening(port, shared=False)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port), timeout=1)
    check_port_free(HOST, port)


def test_sockets_that_share_the_port_listen_and_others_are_refused() -> None:
    with (
        reserve_port(HOST, 0) as port,
        listening(port, shared=True) as first,
        listening(port, shared=True) as second,
    ):
        with pytest.raises(OSError, match="cannot serve"):
            reserve_port(HOST, port).__enter__()
        with pytest.raises(OSError, match="cannot serve"):
            check_port_free(HOST, port)
        first.settimeout(0.01)
        second.settimeout(0.01)
        came = {first: 0, second: 0}
        for _ in range(200):
            with socket.create_connection((HOST, port), timeout=1):
                for server in came:
                    try:
                        server.accept()[0].close()
                    except TimeoutError:
                        continue
                    came[server] += 1
            if all(came.values()):
                break
        assert all(came.values())


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_in_use_is_refused(shared: bool) -> None:
    with listening(0, shared=shared) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match="cannot serve: Address already in use"):
            reserve_port(HOST, port).__enter__()


@pytest.mark.parametrize("shared", [False, True])
def test_lingering_connections_do_not_block_the_port(shared: bool) -> None:
    with listening(0, shared=shared) as before:
        port = before.getsockname()[1]
        with socket.create_connection((HOST, port)) as client:
            before.accept()[0].close()  # closed by the server first, so its side lingers
            assert client.recv(1) == b""
    with reserve_port(HOST, port) as again:
        assert again == port

"""Several servers for a balancing client, which tests kill and restart."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.support.metrics import page
from tests.support.server import ServerProcess, start_server


class Replicas:
    """Servers of the embedded demo, each with a port that it keeps across restarts."""

    def __init__(self, count: int, flags: Sequence[str] = ()) -> None:
        self.ports = free_ports(count)
        self._flags = flags
        self.servers = [self._started(port) for port in self.ports]
        for server in self.servers:
            server.wait_for("ready")

    @property
    def address(self) -> str:
        """One name for all servers, which gRPC resolves."""
        return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def _started(self, port: int) -> ServerProcess:
        flags = ["--port", str(port), "--metrics-port", "0", *self._flags]
        return start_server(flags)

    def kill(self, number: int) -> None:
        """Kill one server, as the kernel does when memory is exhausted."""
        process = self.servers[number].process
        process.kill()
        process.wait()

    def start(self, number: int) -> None:
        """Start one server again, without waiting for it."""
        self.servers[number] = self._started(self.ports[number])

    def serving(self, method: str) -> int:
        """Return the server with an open call of this method."""
        (number,) = (i for i, s in enumerate(self.servers) if alive(s) and open_calls(s, method))
        return number

    def stop(self) -> None:
        """End all servers."""
        for server in self.servers:
            if alive(server):
                server.process.kill()
            server.process.wait()


def free_ports(count: int) -> list[int]:
    """Return different ports that are not in use."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [open_socket.getsockname()[1] for open_socket in sockets]
    for open_socket in sockets:
        open_socket.close()
    return ports


def alive(server: ServerProcess) -> bool:
    return server.process.poll() is None


def open_calls(server: ServerProcess, method: str) -> float:
    """Return the number of calls of a method that have begun and not ended."""
    counts = {"grpc_server_started_total": 0.0, "grpc_server_handled_total": 0.0}
    for family in page(server):
        for found in family.samples:
            if found.name in counts and found.labels.get("grpc_method") == method:
                counts[found.name] += found.value
    return counts["grpc_server_started_total"] - counts["grpc_server_handled_total"]


@contextmanager
def running_replicas(count: int, *flags: str) -> Iterator[Replicas]:
    """Start the servers, wait until all are ready, and end them at the end."""
    replicas = Replicas(count, flags)
    try:
        yield replicas
    finally:
        replicas.stop()

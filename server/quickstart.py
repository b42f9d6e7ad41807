"""The quick start of `make demo`: start a server, run two commands on one prompt, and stop it.

It starts `januslens-server` on free loopback ports, waits until it is ready, runs `januslens trace`
and `januslens gradient`, and always stops the server. The example is from the papers: a fact, and
the projected gradient of a counterfactual.
"""

import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PROMPT = "The capital of Japan is the city of"
COUNTERFACTUAL = " Paris"
READY_WITHIN_SECONDS = 60.0
STOPPED_WITHIN_SECONDS = 10.0

PAGES = Path("build")

SCRIPTS = Path(sysconfig.get_path("scripts"))


def main() -> int:
    """Run the quick start; return the first exit status that is not zero."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        with _running_server() as address:
            return _show(address)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _show(address: str) -> int:
    PAGES.mkdir(exist_ok=True)
    for question, arguments in (
        (
            "Where does the answer come from?",
            ["trace", PROMPT, "--html", str(PAGES / "trace.html")],
        ),
        (
            f'What would a step of gradient descent towards "{COUNTERFACTUAL}" change?',
            [
                "gradient",
                PROMPT,
                "--target",
                COUNTERFACTUAL,
                "--html",
                str(PAGES / "gradient.html"),
            ],
        ),
    ):
        print(f"\n{question}\n$ {_as_typed(arguments)}\n", flush=True)
        shown = subprocess.run(
            [SCRIPTS / "januslens", *arguments, "--server", address], check=False
        )
        if shown.returncode != 0:
            return shown.returncode
    print(f"\nBoth answers are also pages: open {PAGES}/ in a browser.", flush=True)
    return 0


def _as_typed(arguments: list[str]) -> str:
    quoted = [f'"{argument}"' if " " in argument else argument for argument in arguments]
    return " ".join(["januslens", *quoted])


@contextmanager
def _running_server() -> Iterator[str]:
    """Start a server, yield its address when it is ready, and stop it at the end."""
    port, metrics_port = _free_ports(2)
    # Show only warnings and errors, because info lines would appear between the results.
    flags = ["--port", str(port), "--metrics-port", str(metrics_port), "--log-level", "warning"]
    server = subprocess.Popen([SCRIPTS / "januslens-server", *flags])
    try:
        address = f"127.0.0.1:{port}"
        _wait_until_ready(server, address)
        print(f"The server is ready on {address}; it serves the embedded model demo.", flush=True)
        yield address
    finally:
        _stop(server)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [open_socket.getsockname()[1] for open_socket in sockets]
    for open_socket in sockets:
        open_socket.close()
    return ports


def _wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        deadline = time.monotonic() + READY_WITHIN_SECONDS
        while not _is_ready(health):
            if server.poll() is not None:
                sys.exit(f"The server ended before it was ready, with status {server.returncode}.")
            if time.monotonic() > deadline:
                sys.exit(f"The server was not ready within {READY_WITHIN_SECONDS:.0f} s.")
            time.sleep(0.1)


def _is_ready(health: health_pb2_grpc.HealthStub) -> bool:
    with suppress(grpc.RpcError):  # not listening yet
        request = health_pb2.HealthCheckRequest(service="januslens.ready")
        answer: health_pb2.HealthCheckResponse = health.Check(  # type: ignore[attr-defined]  # the type stubs leave it out
            request, timeout=1.0, wait_for_ready=True
        )
        return answer.status == health_pb2.HealthCheckResponse.SERVING
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOPPED_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())

"""If a process cannot start or the supervisor is killed, all processes end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.test_starting import ended
from tests.support.members import members, wait_until_gone
from tests.support.server import running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_an_error_at_start_of_one_process_ends_all(tmp_path: Path) -> None:
    callers = tmp_path / "callers.yaml"
    callers.write_text("callers: 3\n")
    flags = ("--port", "0", "--metrics-port", "0", "--callers", str(callers))
    status, lines = ended("--processes", "2", *flags)
    log = "\n".join(lines)
    assert status == 1
    assert f"januslens-server: cannot serve: {callers}" in log
    assert "process 1 ended with status 1 before it served" in log
    assert "Traceback" not in log


def test_health_reports_loading_and_a_killed_supervisor_ends_all() -> None:
    flags = ("--processes", "2", "--health-port", "0")
    with running_server(*flags, until="model demo needs") as server:
        with grpc.insecure_channel(server.health_address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for service, status in (("", SERVING), ("januslens.ready", NOT_SERVING)):
                request = health_pb2.HealthCheckRequest(service=service)
                assert stub.Check(request, timeout=20).status == status
        processes = members(server)
        assert len(processes) == 1  # the second process starts when the first has loaded
        server.process.kill()
        wait_until_gone(processes, 10)


def test_the_supervisor_does_not_import_torch() -> None:
    program = "import sys, januslens_server.processes.supervisor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

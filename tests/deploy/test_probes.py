"""The deployment's command as a process on loopback, asked as the kubelet and Docker ask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.deploy.manifests import DEPLOY, Manifests, as_written
from tests.support.server import ServerProcess, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LOOPBACK = ("--host", "127.0.0.1", "--metrics-host", "127.0.0.1")


@pytest.fixture(scope="module")
def base() -> Manifests:
    return as_written(DEPLOY / "base")


@pytest.fixture
def pod(base: Manifests, tmp_path: Path) -> Iterator[ServerProcess]:
    """The container's command, from the moment its ports are open."""
    with running_server(*base.arguments(tmp_path), *LOOPBACK, until="metrics on") as process:
        yield process
    if process.process.stdout is not None:
        process.process.stdout.close()


def service(base: Manifests, probe: str) -> str:
    return str(base.container[probe]["grpc"]["service"])


def check(channel: grpc.Channel, service: str) -> int:
    """What the kubelet asks."""
    request = health_pb2.HealthCheckRequest(service=service)
    stub = health_pb2_grpc.HealthStub(channel)
    answer: health_pb2.HealthCheckResponse = stub.Check(  # type: ignore[attr-defined]  # untyped
        request, timeout=5
    )
    return answer.status


def watch(channel: grpc.Channel, service: str) -> Iterator[int]:
    """Every state from now on: no change between two questions is missed."""
    request = health_pb2.HealthCheckRequest(service=service)
    stub = health_pb2_grpc.HealthStub(channel)
    answers = stub.Watch(request, timeout=60)  # type: ignore[attr-defined]  # untyped
    return (answer.status for answer in answers)


def docker_healthcheck(address: str) -> subprocess.CompletedProcess[str]:
    host, _, port = address.rpartition(":")
    return subprocess.run(
        [sys.executable, str(DEPLOY / "healthcheck.py")],
        env=os.environ | {"JANUSLENS_HOST": host, "JANUSLENS_PORT": port},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_pod_is_alive_then_ready_then_drained(base: Manifests, pod: ServerProcess) -> None:
    with grpc.insecure_channel(pod.address) as channel:
        # While models load as later: a pod that loads is not to be restarted.
        assert check(channel, service(base, "livenessProbe")) == SERVING

        readiness = watch(channel, service(base, "readinessProbe"))
        loading = list(takewhile(lambda status: status != SERVING, readiness))
        assert set(loading) <= {NOT_SERVING}
        assert check(channel, service(base, "startupProbe")) == SERVING
        assert docker_healthcheck(pod.address).returncode == 0

        pod.process.terminate()
        assert next(readiness) == NOT_SERVING
        grace = base.pod["spec"]["terminationGracePeriodSeconds"]
        assert pod.process.wait(timeout=grace) == 0


def test_the_image_is_unhealthy_without_a_server() -> None:
    checked = docker_healthcheck("127.0.0.1:1")
    assert checked.returncode == 1
    assert "UNAVAILABLE" in checked.stderr

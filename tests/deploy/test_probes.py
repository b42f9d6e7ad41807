"""Run the pod's own command line with its variables, files and restrictions, and its probes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.deploy.confinement import confined
from tests.deploy.manifests import DEPLOY, Manifests, base, with_components
from tests.deploy.test_manifests import PROCESS_BYTES
from tests.support.calls import long_trace, started
from tests.support.certificates import server_files, trusting
from tests.support.metrics import sample
from tests.support.server import ServerProcess, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LOOPBACK = ("--host", "127.0.0.1", "--metrics-host", "127.0.0.1")
KUBELET_TIMEOUT = 1  # seconds, where a probe gives none


@contextmanager
def running_pod(
    manifests: Manifests, folder: Path, secrets: dict[str, Path]
) -> Iterator[ServerProcess]:
    """Start the container's process, and yield it when its ports are open."""
    environment = manifests.environment(secrets)
    scratch = folder / "scratch"
    flags = [*manifests.arguments(folder), *LOOPBACK]
    if "JANUSLENS_HEALTH_PORT" in environment:
        flags += ["--health-port", "0"]
    with running_server(
        *flags,
        until="serving on",
        environment=environment | {"TMPDIR": str(scratch)},
        within=confined(scratch),
    ) as process:
        yield process
    if process.process.stdout is not None:
        process.process.stdout.close()


class Probes:
    """The kubelet's probes of a pod, run on demand."""

    def __init__(self, manifests: Manifests, channel: grpc.Channel) -> None:
        self._container = manifests.container
        self._stub: Any = health_pb2_grpc.HealthStub(channel)

    def ask(self, probe: str) -> int:
        timeout = self._container[probe].get("timeoutSeconds", KUBELET_TIMEOUT)
        status: int = self._stub.Check(self._request(probe), timeout=timeout).status
        return status

    def watch(self, probe: str) -> Iterator[int]:
        """Yield every state from now on, including those between two requests."""
        return (answer.status for answer in self._stub.Watch(self._request(probe), timeout=60))

    def _request(self, probe: str) -> health_pb2.HealthCheckRequest:
        return health_pb2.HealthCheckRequest(service=self._container[probe]["grpc"]["service"])


def test_a_pod_is_alive_then_ready_then_drained(tmp_path: Path) -> None:
    manifests = base()
    grace = manifests.pod["spec"]["terminationGracePeriodSeconds"]
    with (
        running_pod(manifests, tmp_path, {}) as pod,
        grpc.insecure_channel(pod.address) as channel,
    ):
        probes = Probes(manifests, channel)
        # This also holds while models load, because a loading pod must not be restarted.
        assert probes.ask("livenessProbe") == SERVING
        readiness = probes.watch("readinessProbe")
        loading = list(takewhile(lambda status: status != SERVING, readiness))
        assert set(loading) == {NOT_SERVING}
        assert probes.ask("startupProbe") == SERVING
        assert sample(pod, "process_resident_memory_bytes") < PROCESS_BYTES

        stream = started(channel, "Trace", long_trace(1), timeout=60)
        next(stream)
        assert probes.ask("livenessProbe") == SERVING
        assert probes.ask("readinessProbe") == SERVING

        pod.process.terminate()
        assert next(readiness) == NOT_SERVING
        *_, last = stream
        assert last.WhichOneof("event") == "summary"
        assert pod.process.wait(timeout=grace) == 0


def test_a_pod_with_tls_and_callers_is_probed_in_plaintext(tmp_path: Path) -> None:
    manifests = with_components("tls", "auth")
    grace = manifests.pod["spec"]["terminationGracePeriodSeconds"]
    authority = trustme.CA()
    server_files(authority, tmp_path)
    entry = {"name": "somebody", "tokens": [{"sha256": "0" * 64}]}
    (tmp_path / "callers.yaml").write_text(yaml.safe_dump({"callers": [entry]}))
    secrets = dict.fromkeys(manifests.mount_paths("secret"), tmp_path)
    with (
        running_pod(manifests, tmp_path, secrets) as pod,
        grpc.insecure_channel(pod.health_address) as probed,
        grpc.secure_channel(pod.address, trusting(authority)) as channel,
    ):
        pod.wait_for("ready")
        call = started(channel, "Trace", long_trace(1))
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert Probes(manifests, probed).ask("readinessProbe") == SERVING
        pod.process.terminate()
        assert pod.process.wait(timeout=grace) == 0


def docker_healthcheck(address: str) -> subprocess.CompletedProcess[str]:
    host, _, port = address.rpartition(":")
    return subprocess.run(
        [sys.executable, str(DEPLOY / "healthcheck.py")],
        env=os.environ | {"JANUSLENS_HOST": host, "JANUSLENS_PORT": port},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_image_is_healthy_while_its_server_is_ready(server: ServerProcess) -> None:
    assert docker_healthcheck(server.address).returncode == 0


def test_the_health_check_does_not_import_torch() -> None:
    """Importing torch takes seconds, and the check runs every 15 s with a timeout of 10 s."""
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", program, str(DEPLOY / "healthcheck.py")]
    assert subprocess.run(command, check=False).returncode == 0


def test_the_image_is_unhealthy_without_a_server() -> None:
    checked = docker_healthcheck("127.0.0.1:1")
    assert checked.returncode == 1
    assert "UNAVAILABLE" in checked.stderr

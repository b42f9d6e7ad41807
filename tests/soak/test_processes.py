"""Several processes behind one port: failures, restarts and lost devices."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import grpc
import pytest

from januslens.v1 import trace_pb2
from tests.support.calls import prompt, refused, started
from tests.support.members import members, wait_until_gone
from tests.support.model_folders import WEIGHTS, healthy
from tests.support.server import running_server

pytestmark = pytest.mark.soak

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
TRACE = trace_pb2.TraceRequest(input=prompt("The capital of Japan is"))


def test_processes_with_different_models_do_not_serve(tmp_path: Path) -> None:
    """The usual reason is memory that is enough for only one; here a file disappears."""
    folder = healthy(tmp_path / "model")
    with running_server("--processes", "2", "--model", f"a={folder}", until="READY") as server:
        (folder / WEIGHTS).unlink()
        first = members(server)[:1]
        assert server.process.wait(timeout=60) == 1
        wait_until_gone(first, 1)
    assert "model a FAILED" in server.log
    assert "cannot serve: process 2 loaded no model, but the other processes loaded a" in server.log
    assert "Traceback" not in server.log


def test_restarts_of_a_failing_process_are_delayed_longer_each_time(tmp_path: Path) -> None:
    folder = healthy(tmp_path / "model")
    with running_server("--processes", "2", "--model", f"a={folder}") as server:
        weights = folder / WEIGHTS
        weights.rename(folder / "away")
        os.kill(members(server)[0], signal.SIGKILL)
        server.wait_for("process 1 ended with status 137; restarting it in 1 s")
        server.wait_for("process 1 loaded no model, but the other processes loaded a")
        server.wait_for("process 1 ended with status 0; restarting it in 2 s")
        with grpc.insecure_channel(server.address) as channel:  # the other one serves on
            assert list(started(channel, "Trace", TRACE))[-1].HasField("summary")
        (folder / "away").rename(weights)
        server.wait_for("process 1 serves again")
        os.kill(members(server)[-1], signal.SIGKILL)
        server.wait_for("process 1 ended with status 137; restarting it in 1 s")


def test_a_process_whose_device_is_lost_is_replaced(tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    program = (sys.executable, "-m", "tests.soak.device_losing_server", str(lost))
    with running_server("--processes", "2", program=program) as server:
        lost.touch()
        with grpc.insecure_channel(server.address, OWN_CONNECTION) as channel:
            assert refused(channel, "Trace", TRACE).reason == "DEVICE_LOST"
        lost.unlink()
        server.wait_for("the device has failed")
        server.wait_for(" ended with status 1; restarting it in 1 s")
        server.wait_for(" serves again")
        with grpc.insecure_channel(server.address, OWN_CONNECTION) as channel:
            assert list(started(channel, "Trace", TRACE))[-1].HasField("summary")
    assert server.process.returncode == 0

"""`januslens.launch`, a server that ends with the process that started it, and `doctor`."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

import januslens
from januslens.cli.program import januslens as program
from tests.support.members import wait_until_gone

PROMPT = "The capital of Japan is the city of"

# `launch` starts its server in this way. It is killed before the server has imported anything.
START_AND_DIE = """
import os, signal
from januslens import launching
server = launching._LocalServer([])
print(server._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

START_WITHOUT_STRUCTLOG = """
import sys
sys.modules["structlog"] = None
from januslens_server.__main__ import main
main()
"""


def test_launch_serves_the_demo_model_until_the_client_closes() -> None:
    """`demo` is the embedded model, and not sought on the hub."""
    steps: list[str] = []
    with januslens.launch("demo", progress=steps.append, max_waiting=3) as client:
        assert client.trace(PROMPT).target().predicted.text == " Tokyo"
        with januslens.Client(client.address) as other:
            assert [model.name for model in other.list_models()] == ["demo"]
        address, server = client.address, client._server._process
    # Its status is 0 only if it stopped because its input ended, without being killed.
    assert server.returncode == 0
    assert is_closed(address)
    assert steps[0] == "starting the server"
    assert steps[-1].startswith(f"ready on {address} after ")


def test_a_server_that_starts_stops_when_the_launching_process_is_killed() -> None:
    launched = subprocess.run(
        [sys.executable, "-c", START_AND_DIE], check=False, capture_output=True, text=True
    )
    assert launched.returncode == -signal.SIGKILL, launched.stderr
    wait_until_gone([int(launched.stdout)], 60)


def test_a_model_that_does_not_load_is_reported_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(januslens.LaunchError, match=r"broken: .*config.json"):
        januslens.launch(f"broken={tmp_path}", progress=None)


def test_an_unknown_setting_is_reported_with_the_message_of_the_server() -> None:
    with pytest.raises(januslens.LaunchError, match="No such option '--devce'"):
        januslens.launch(devce="cpu", progress=None)


def test_a_server_without_its_libraries_says_how_to_install_them() -> None:
    started = subprocess.run(
        [sys.executable, "-c", START_WITHOUT_STRUCTLOG],
        check=False,
        capture_output=True,
        text=True,
    )
    assert started.returncode == 1
    assert started.stderr == "januslens-server needs structlog: pip install 'januslens[server]'\n"


def is_closed(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionRefusedError:
        return True
    return False


def test_doctor_shows_libraries_devices_and_models() -> None:
    done = CliRunner().invoke(program, ["doctor", "demo=/no/such/folder"])
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[0].startswith(f"januslens {metadata.version('januslens')}, Python 3.")
    assert "  extra server: installed" in lines
    assert any(line.startswith("  cpu: ") for line in lines)
    assert lines[-1].startswith("model not loaded: demo: /no/such/folder: ")


def test_doctor_names_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    done = CliRunner().invoke(program, ["doctor", "some-model"])
    assert done.exit_code == 1
    assert "run pip install 'januslens[server]' (missing torch)" in done.output
    assert done.output.endswith("models are not checked: the extra server is not installed\n")

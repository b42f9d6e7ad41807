"""Start the server: its log lines, and its error line if it cannot serve."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from januslens_server.config import read_settings
from januslens_server.serving.assembly import serve
from tests.support.server import ServerProcess


def ended(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run a server that exits by itself because it cannot serve."""
    return subprocess.run(
        [sys.executable, "-m", "januslens_server", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_log_shows_address_models_and_device(server: ServerProcess) -> None:
    lines = "\n".join(server.lines)
    assert re.search(r"serving on 127\.0\.0\.1:[1-9]\d+$", lines, re.MULTILINE)
    assert re.search(r"metrics on http://127\.0\.0\.1:[1-9]\d+/metrics$", lines, re.MULTILINE)
    assert re.search(r"model demo READY: .*, 4 layers of 128, float32 on cpu$", lines, re.MULTILINE)
    assert lines.index("READY") < lines.index("januslens_server: ready")


def test_a_second_server_on_the_port_is_refused(server: ServerProcess) -> None:
    port = server.address.rpartition(":")[2]
    second = ended("--port", port, "--metrics-port", "0")
    assert second.returncode == 1
    assert second.stdout == ""
    (line,) = second.stderr.splitlines()
    assert line.startswith("januslens-server: cannot serve: Address already in use")
    assert port in line


def test_a_metrics_port_in_use_is_refused(server: ServerProcess) -> None:
    port = urlsplit(server.metrics_url).port
    settings = read_settings(["--port", "0", "--metrics-port", f"{port}"])
    with pytest.raises(OSError, match=rf"cannot serve: Address already in use .*{port}"):
        asyncio.run(serve(settings))


def test_an_unavailable_device_is_refused() -> None:
    refused = ended("--port", "0", "--metrics-port", "0", "--device", "cuda:99")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("januslens-server: cannot serve: device 'cuda:99' is not available: ")


def test_an_unknown_variable_is_warned_about(server: ServerProcess) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "januslens_server", "--port", server.address.rpartition(":")[2]],
        env=os.environ | {"JANUSLENS_MAX_WAITNG": "3"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "WARNING januslens_server: unknown environment variable" in refused.stderr


def test_an_invalid_setting_is_refused_with_one_line() -> None:
    """tests/unit/test_config.py has the other invalid settings."""
    wrong = ended("--port", "nonsense")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("januslens-server: invalid --port 'nonsense'")

"""Start the server: its log lines, and its error line if it cannot serve."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

import pytest

from januslens_server.config import read_settings
from januslens_server.serving.assembly import serve
from tests.support.server import ServerProcess, start_server


def ended(*flags: str, environment: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Run a server that exits by itself because it cannot serve; return its status and output."""
    server = start_server(flags, environment)
    status = server.process.wait(timeout=60)
    server.reader.join()
    return status, server.lines


def test_the_log_shows_address_models_and_device(server: ServerProcess) -> None:
    lines = "\n".join(server.lines)
    assert re.search(r"serving on 127\.0\.0\.1:[1-9]\d+$", lines, re.MULTILINE)
    assert re.search(r"metrics on http://127\.0\.0\.1:[1-9]\d+/metrics$", lines, re.MULTILINE)
    assert re.search(r"model demo READY: .*, 4 layers of 128, float32 on cpu$", lines, re.MULTILINE)
    assert lines.index("READY") < lines.index("januslens_server: ready")


def test_a_second_server_on_the_port_is_refused(server: ServerProcess) -> None:
    port = server.address.rpartition(":")[2]
    status, (line,) = ended("--port", port, "--metrics-port", "0")
    assert status == 1
    assert line.startswith("januslens-server: cannot serve: Address already in use")
    assert port in line


def test_a_metrics_port_in_use_is_refused(server: ServerProcess) -> None:
    port = urlsplit(server.metrics_url).port
    settings = read_settings(["--port", "0", "--metrics-port", f"{port}"])
    with pytest.raises(OSError, match=rf"cannot serve: Address already in use .*{port}"):
        asyncio.run(serve(settings))


def test_an_unavailable_device_is_refused() -> None:
    status, (line,) = ended("--port", "0", "--metrics-port", "0", "--device", "cuda:99")
    assert status == 1
    assert line.startswith("januslens-server: cannot serve: device 'cuda:99' is not available: ")


def test_an_unknown_variable_is_warned_about(server: ServerProcess) -> None:
    port = server.address.rpartition(":")[2]
    _, lines = ended("--port", port, environment={"JANUSLENS_MAX_WAITNG": "3"})
    assert "WARNING januslens_server: unknown environment variable" in "\n".join(lines)


def test_an_invalid_setting_is_refused_with_one_line() -> None:
    """tests/unit/test_config.py has the other invalid settings."""
    status, (line,) = ended("--port", "nonsense")
    assert status == 2
    assert line.startswith("januslens-server: invalid --port 'nonsense'")

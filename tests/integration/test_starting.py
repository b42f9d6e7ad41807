"""Starting: what the server says, and the one line with which it ends where it cannot serve."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from januslens_server.config import read_settings
from januslens_server.serving.alone import serve
from tests.support.server import ServerProcess


def ended(*flags: str) -> subprocess.CompletedProcess[str]:
    """The server's whole life, where it cannot serve."""
    return subprocess.run(
        [sys.executable, "-m", "januslens_server", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_says_where_it_serves_what_and_on_which_device(server: ServerProcess) -> None:
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


def test_a_wrong_setting_ends_it_with_one_line() -> None:
    """The other wrong settings are tests of `config`."""
    wrong = ended("--port", "nonsense")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("januslens-server: Invalid value for '--port': 'nonsense'")

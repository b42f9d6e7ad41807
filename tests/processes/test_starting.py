"""Several processes that cannot begin, or whose supervisor is killed: nothing of them stays."""

from __future__ import annotations

from pathlib import Path

from tests.integration.test_starting import ended
from tests.support.members import members, wait_until_gone
from tests.support.server import running_server


def test_what_keeps_one_from_beginning_ends_all(tmp_path: Path) -> None:
    callers = tmp_path / "callers.yaml"
    callers.write_text("callers: 3\n")
    flags = ("--port", "0", "--metrics-port", "0", "--callers", str(callers))
    found = ended("--processes", "2", *flags)
    assert found.returncode == 1
    assert f"januslens-server: cannot serve: {callers}" in found.stderr
    assert "process 1 ended with status 1 before it served" in found.stderr
    assert "Traceback" not in found.stderr


def test_the_supervisors_death_is_that_of_all() -> None:
    with running_server("--processes", "2", until="model demo takes") as server:
        processes = members(server)
        assert len(processes) == 1  # the second one waits for its turn
        server.process.kill()
        wait_until_gone(processes, 10)

"""Shared fixtures, and the environment variables that must be set before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

# One OpenMP thread gives deterministic sums and leaves the cores to the server.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The width of the output must not depend on the terminal that runs the tests.
os.environ.pop("COLUMNS", None)

import pytest

from tests.support.server import ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A real server with the demo model, READY."""
    with running_server() as process:
        yield process


@pytest.fixture(scope="session")
def server_address(server: ServerProcess) -> str:
    """Address of the session's server."""
    return server.address

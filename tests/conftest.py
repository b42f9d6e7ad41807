"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported anywhere: deterministic sums, and no spinning beside the server's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Output as wide as into a file, whatever terminal the tests were started from.
os.environ.pop("COLUMNS", None)

import pytest

from tests.support.server import ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The real server with the embedded demo, READY."""
    with running_server() as process:
        yield process


@pytest.fixture(scope="session")
def server_address(server: ServerProcess) -> str:
    """Where the session's server answers."""
    return server.address

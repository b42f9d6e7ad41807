"""One server per file, so that memory measurements do not affect each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ServerProcess, running_server

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here as `soak`, which pyproject.toml deselects by default."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="module")
def soaked() -> Iterator[ServerProcess]:
    """A real server with the embedded model, READY."""
    with running_server() as process:
        yield process

"""One live page for the session's server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ui import LivePage, live_page


@pytest.fixture(scope="session")
def page(server_address: str) -> Iterator[LivePage]:
    """A running `januslens ui`."""
    with live_page(server_address) as started:
        yield started

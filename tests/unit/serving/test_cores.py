"""Threads per request, by settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from januslens_server.config import read_settings
from januslens_server.serving.assembly import set_threads


@pytest.fixture
def four_cores() -> Iterator[None]:
    """Torch's own thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("flags", "cores"),
    [
        ([], 4),
        (["--processes", "2"], 2),
        (["--processes", "3"], 1),
        (["--processes", "8"], 1),
        (["--threads", "3"], 3),
        (["--processes", "2", "--threads", "3"], 3),
    ],
)
def test_the_default_is_divided_among_processes(flags: list[str], cores: int) -> None:
    set_threads(read_settings(flags))
    assert torch.get_num_threads() == cores

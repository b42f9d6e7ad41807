"""Results of work on free cores are in order, and do not depend on the number of cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from januslens_server.lens.cpu import on_free_cores
from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.lens.projection import project
from januslens_server.lens.unembedding import FEWEST_TOKENS, Unembedding
from januslens_server.specs import LensSpec

CORES = 3


@pytest.fixture
def several_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("several_cores")
def test_results_come_in_order_from_threads_that_compute_alone() -> None:
    # The barrier is passed only if each item is computed by a separate thread.
    meeting = threading.Barrier(CORES, timeout=30)

    def work(item: int) -> tuple[int, str, int]:
        meeting.wait()
        time.sleep(0.02 * (CORES - item))
        return item, threading.current_thread().name, torch.get_num_threads()

    found = on_free_cores(work, range(CORES))
    assert [item for item, _, _ in found] == list(range(CORES))
    assert len({name for _, name, _ in found}) == CORES
    assert {threads for _, _, threads in found} == {1}
    assert torch.get_num_threads() == CORES


@pytest.mark.usefixtures("several_cores")
def test_pieces_of_a_busy_core_go_to_the_others() -> None:
    release = threading.Event()

    def work(item: int) -> str:
        if item == 0:
            release.wait(30)
        if item == 19:
            release.set()
        return threading.current_thread().name

    slow, *others = on_free_cores(work, range(20))
    assert slow not in others


@pytest.mark.usefixtures("several_cores")
def test_errors_and_inference_mode_are_passed_on() -> None:
    def failing(item: int) -> int:
        if item == 2:
            raise ValueError("the third")
        return item

    with pytest.raises(ValueError, match="the third"):
        on_free_cores(failing, range(4))
    with torch.inference_mode():
        modes = on_free_cores(lambda _: torch.is_inference_mode_enabled(), range(4))
    assert modes == [True] * 4
    with torch.no_grad():
        assert on_free_cores(lambda _: torch.is_grad_enabled(), range(4)) == [False] * 4


@pytest.mark.usefixtures("several_cores")
def test_a_projection_does_not_depend_on_the_number_of_cores() -> None:
    random = torch.Generator().manual_seed(0)
    width, vocab = 24, 3 * FEWEST_TOKENS + 7
    norm = Norm(torch.ones(width), None, 1e-5, centred=True)
    head = LensHead(norm, Unembedding(torch.randn(vocab, width, generator=random)))
    vectors = torch.randn(700, width, generator=random)
    targets = torch.arange(700)[:, None]
    several = project(head, vectors, LensSpec(), targets)
    torch.set_num_threads(1)
    one = project(head, vectors, LensSpec(), targets)
    for name, column in vars(one).items():
        assert (column == getattr(several, name)).all(), name

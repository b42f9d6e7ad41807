"""Process-wide tuning: OpenMP's spin count, TF32, threads of each process, garbage collections."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from januslens_server import tuning
from januslens_server.tuning import SPIN_COUNT, limit_spinning, set_threads

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_a_spin_count_of_the_operator_is_kept(
    given: dict[str, str], then: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:  # set first, so that what is set below is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    limit_spinning()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == then


def test_the_spin_count_is_set_before_torch_is_imported() -> None:
    program = """
import sys
from januslens_server import tuning
from januslens_server.__main__ import main
def called():
    print("torch" in sys.modules)
    raise SystemExit(0)
tuning.limit_spinning = called
sys.argv = ["januslens-server", "--port", "0"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False"], done.stderr


OVERRIDDEN_TF32 = """
import sys
from januslens_server import tuning
for warning in tuning.remove_tf32_overrides():
    print(warning)
assert "torch" not in sys.modules
import torch
print(torch.get_float32_matmul_precision())
torch.set_float32_matmul_precision("high")
tuning.disable_tf32()
print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
print(torch.backends.cudnn.allow_tf32)
"""


def test_variables_that_turn_tf32_on_are_ignored_with_a_warning() -> None:
    variables = {"NVIDIA_TF32_OVERRIDE": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OVERRIDDEN_TF32],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    ignored = "is ignored: float32 is computed in float32, not in TF32"
    assert done.stdout.splitlines() == [
        f"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 {ignored}",
        f"NVIDIA_TF32_OVERRIDE=1 {ignored}",
        "highest",
        "highest False",
        "False",
    ]


def test_variables_that_turn_tf32_off_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert list(tuning.remove_tf32_overrides()) == []
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Set torch's thread count to 4, and restore it after the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    ("threads", "processes", "expected"),
    [
        (None, 1, 4),
        (None, 2, 2),
        (None, 3, 1),
        (None, 8, 1),
        (3, 1, 3),
        (3, 2, 3),
    ],
)
def test_the_default_threads_are_divided_among_processes(
    threads: int | None, processes: int, expected: int
) -> None:
    set_threads(threads, processes)
    assert torch.get_num_threads() == expected


LARGE_BLOCKS = """
import psutil, torch
from januslens_server import tuning
tuning.map_large_blocks()
own = psutil.Process()
for _ in range(3):  # by default, glibc learns from freed blocks to keep blocks of that size
    torch.ones(7_000_000)
before, kept = own.memory_info().rss, []
for _ in range(20):
    large = torch.ones(5_000_000)
    kept.append(torch.ones(20_000))  # in the heap, above a block that is freed
    large = torch.ones(4_000_000 + 10_000 * len(kept))
del large
print((own.memory_info().rss - before) >> 20)
"""


def test_freed_activations_return_to_the_system() -> None:
    grown = subprocess.run(
        [sys.executable, "-c", LARGE_BLOCKS], capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) < 10


FAULTS = """
import resource, torch
from januslens_server import tuning
tuning.map_large_blocks()
from januslens_server.lens.unembedding import Unembedding
unembedding = Unembedding(torch.ones(16_384, 64))
vectors, logits = torch.ones(512, 64), torch.empty(512, 16_384)
def compute():
    for block in unembedding.blocks:
        block.logits(vectors, logits[:, block.tokens])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = compute()
print(compute() - before)
"""


def test_repeated_products_reuse_memory() -> None:
    """Products of 32 MiB in memory from the system would take 8,192 page faults."""
    faults = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    assert int(faults.stdout) < 2000


@pytest.mark.parametrize("overdue", [False, True])
async def test_full_collections_wait_until_the_server_is_idle_or_they_are_overdue(
    overdue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "COLLECTION_SECONDS", 0.001)
    if overdue:
        monkeypatch.setattr(tuning, "LATEST_COLLECTION_SECONDS", 0.0)
    thresholds, busy = gc.get_threshold(), True
    asked = 0

    def is_busy() -> bool:
        nonlocal asked
        asked += 1
        return busy

    collecting = asyncio.create_task(tuning.collect_garbage(is_busy))
    try:
        await asyncio.sleep(0)  # Python's own full collections are off from here on
        before = full_collections()
        for _ in range(2 * tuning.YOUNG_COLLECTIONS):
            gc.collect(1)
        async with asyncio.timeout(60):
            while asked < 2 and full_collections() == before:  # noqa: ASYNC110 - the task sets no event
                await asyncio.sleep(0.001)
            assert (full_collections() > before) == overdue
            busy = False
            while full_collections() == before:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.001)
    finally:
        collecting.cancel()
        gc.set_threshold(*thresholds)


def full_collections() -> int:
    """Return how many full garbage collections this process has run."""
    return int(gc.get_stats()[2]["collections"])

"""Process-wide tuning of threads and memory, with the measured effect of each, and TF32 off."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator

# Iterations that an idle thread of GNU OpenMP, part of torch's wheels, spins before it sleeps. The
# default of 300,000 takes 10 % of a trace's processor time, on a core that could project or encode.
SPIN_COUNT = "1000"

# Bytes from which glibc maps a block of its own, which returns to the system when it is freed. By
# default this grows to 32 MiB as blocks are freed: then activations of long prompts fragment the
# heap, and a pass of 3,000 tokens through Gemma 3 270M grew the process by 960 MB instead of 200.
# Each new mapping takes a page fault per page, so the lens computes its products in smaller blocks
# (`lens.unembedding.PRODUCT_BYTES`), which the heap reuses.
MAPPED_BYTES = 2**20
# Bytes of free memory at the end of a heap that glibc keeps. With its default of 128 KiB it would
# return the block of one product to the system before the next one needs it.
KEPT_BYTES = 4 * 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h

# Variables with which torch and NVIDIA's libraries multiply float32 matrices in TF32, which keeps
# 10 of 23 bits.
TF32_VARIABLES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")


def limit_spinning() -> None:
    """Set the spin count, unless the environment sets one; call it before torch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def map_large_blocks() -> None:
    """Fix glibc's thresholds, unless the environment tunes them; do nothing without glibc."""
    names = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    tuned = bool(names & os.environ.keys())
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and not tuned:
        set_option(M_MMAP_THRESHOLD, MAPPED_BYTES)
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)


def remove_tf32_overrides() -> Iterator[str]:
    """Remove variables that turn TF32 on, and return a warning for each.

    Call it before torch is imported, because libraries read their variables when they start.
    """
    for name in TF32_VARIABLES:
        if os.environ.get(name, "0") != "0":
            value = os.environ.pop(name)
            yield f"{name}={value} is ignored: float32 is computed in float32, not in TF32"


def disable_tf32() -> None:
    """Compute float32 products and convolutions in float32.

    torch's default is TF32 for the convolutions of a GPU.
    """
    import torch  # noqa: PLC0415 - `limit_spinning` comes before the first import of torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def set_threads(threads: int | None, processes: int) -> None:
    """Set torch's thread count: `threads`, else torch's default divided by `processes`."""
    import torch  # noqa: PLC0415 - `limit_spinning` comes before the first import of torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


# Seconds between two looks at whether a full garbage collection is due, and after which it runs
# even though requests are open. Requests have up to 200,000 objects each, and a collection of them
# would delay all others, and health, by 0.1 s for each. Their objects need none: only the errors of
# calls are garbage in cycles, a few KiB each.
COLLECTION_SECONDS, LATEST_COLLECTION_SECONDS = 1.0, 60.0
# Collections of young objects after which a full one is due, as in Python.
YOUNG_COLLECTIONS = 10


async def collect_garbage(busy: Callable[[], bool]) -> None:
    """Run full garbage collections, in place of Python, when the server is not `busy`."""
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 2**31 - 1)
    last = time.monotonic()
    while True:
        await asyncio.sleep(COLLECTION_SECONDS)
        due = gc.get_count()[2] > YOUNG_COLLECTIONS
        if due and (not busy() or time.monotonic() - last > LATEST_COLLECTION_SECONDS):
            gc.collect()
            last = time.monotonic()


def freeze_objects() -> None:
    """Exempt all live objects from garbage collection; call it when the models are loaded.

    Models, vocabularies and torch have about 380,000 objects. A full collection of them would delay
    a request by 0.2 s.
    """
    gc.collect()
    gc.freeze()


def release_objects() -> None:
    """Free what a model that is no longer used leaves behind, including what was exempt.

    Free memory of the heap returns to the system.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

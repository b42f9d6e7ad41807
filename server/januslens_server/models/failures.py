"""What a request failed of, in the service's terms: no memory, a lost device, or a bug."""

from __future__ import annotations

from collections.abc import Callable

import torch

from januslens_server.errors import DeviceLost, OutOfMemory

# How torch's CPU allocator says so, in a plain RuntimeError.
CPU_ALLOCATOR = "DefaultCPUAllocator: "


def devices_answer() -> bool:
    """Whether every GPU still computes: after some errors none does until the process ends."""
    try:
        for device in range(torch.cuda.device_count()):
            torch.ones(1, device=f"cuda:{device}").item()
    except RuntimeError:
        return False
    return True


def in_service_terms(error: Exception, answers: Callable[[], bool] = devices_answer) -> Exception:
    """`OutOfMemory` and `DeviceLost` for what torch says of them; else the error itself.

    An error of an accelerator may be a bug's or the device's end: `answers` says whether it still
    computes.
    """
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if exhausted or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)):
        return OutOfMemory(
            "the device had no memory left for this request, which holds none of it any more; "
            "ask for fewer layers, positions or parts, or try again when less runs"
        )
    if isinstance(error, torch.AcceleratorError) and not answers():
        return DeviceLost()
    return error

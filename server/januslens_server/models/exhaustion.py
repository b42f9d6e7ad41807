"""Telling a request that needed too much memory from a bug."""

from __future__ import annotations

import torch

from januslens_server.errors import OutOfMemory

# How torch's CPU allocator says so, in a plain RuntimeError.
CPU_ALLOCATOR = "DefaultCPUAllocator: "


def in_service_terms(error: Exception) -> Exception:
    """`OutOfMemory` for what a device or the host says when it has none left; else the error."""
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if exhausted or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)):
        return OutOfMemory(
            "the device had no memory left for this request, which holds none of it any more; "
            "ask for fewer layers, positions or parts, or try again when less runs"
        )
    return error

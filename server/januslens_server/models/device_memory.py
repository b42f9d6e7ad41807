"""What the devices' memory is used for, as an operator watches it."""

from __future__ import annotations

import psutil
import torch

from januslens_server.models import memory

# allocated: tensors, of a CPU the whole process; reserved: kept by torch for further tensors;
# available: left for new ones; total: the device's, of a CPU the container's limit.
KINDS = {
    "cpu": ("allocated", "available", "total"),
    "cuda": ("allocated", "reserved", "available", "total"),
}


def watched_devices(configured: str) -> list[str]:
    """The CPU, and unless models stay there all GPUs that torch sees."""
    if configured == "cpu" or not torch.cuda.is_available():
        return ["cpu"]
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def kinds(device: str) -> tuple[str, ...]:
    """The kinds of memory that are known of a device."""
    return KINDS[torch.device(device).type]


def used_bytes(device: str, kind: str) -> float:
    """Bytes of one kind; NaN where the machine does not tell."""
    place = torch.device(device)
    found = _of_gpu(kind, place) if place.type == "cuda" else _of_cpu(kind)
    return float("nan") if found is None else float(found)


def _of_gpu(kind: str, device: torch.device) -> int | None:
    if kind == "allocated":
        return torch.cuda.memory_allocated(device)
    if kind == "reserved":
        return torch.cuda.memory_reserved(device)
    if kind == "total":
        return memory.total_memory(str(device))
    return memory.available(str(device), {})


def _of_cpu(kind: str) -> int | None:
    if kind == "allocated":
        return psutil.Process().memory_info().rss
    if kind == "total":
        return memory.total_memory("cpu")
    return memory.available("cpu", {})

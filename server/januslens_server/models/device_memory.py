"""Measure the total and the free memory of devices."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from januslens_server.errors import ModelFailed

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")

# cgroup version 1 reports a larger number if there is no limit.
UNLIMITED = 2**60

# Requests leave a 16th of the device's memory free, within these bounds, for memory that is not
# estimated: messages, the interpreter, and fragmentation of the allocator.
RESERVED = 16
SMALLEST_RESERVE, LARGEST_RESERVE = 64 * 2**20, 2**30

# allocated: tensors, on a CPU the whole process; reserved: kept by torch for later tensors;
# available: free for new tensors; total: the device's memory, on a CPU the container's limit.
KINDS = {
    "cpu": ("allocated", "available", "total"),
    "cuda": ("allocated", "reserved", "available", "total"),
}


def available(device: str, limits: Mapping[str, int]) -> int:
    """Return the bytes that a model may use: the operator's limit, or else the free memory.

    Raises `ModelFailed` for a CUDA device that torch cannot use.
    """
    limit = limits.get(device, limits.get(f"{device}:0"))
    return _free(torch.device(device)) if limit is None else limit


def free_for_requests(device: str, needed: float = 0) -> float:
    """Bytes that requests may still take on a device, after subtracting a reserve.

    If `needed` bytes are not free, memory that was freed but not returned to the system is returned
    first. With `auto` the GPU with the least free memory counts.
    """
    names = [device]
    if device == "auto":
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    free = min(_for_requests(name) for name in names)
    if free < needed and "cpu" in names:
        _give_back()
        free = _for_requests("cpu")
    return free


def _for_requests(device: str) -> float:
    reserve = min(max(total_memory(device) // RESERVED, SMALLEST_RESERVE), LARGEST_RESERVE)
    return available(device, {}) - reserve


def _give_back() -> None:
    """Let the C library return freed memory to the system, if it has `malloc_trim`."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return free_memory()
    if not torch.cuda.is_available():
        raise ModelFailed("torch finds no usable CUDA device")
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def free_memory(groups: Groups | None = None) -> int:
    """Bytes that this process may still allocate under the machine's, cgroups' and process limits.

    Linux counts pages of mapped files as free. The pages that this process maps are its models'
    weights, which are in constant use, so they do not count as free here.
    """
    process = psutil.Process()
    own = process.memory_info()
    mapped = own.shared
    found = [psutil.virtual_memory().available - mapped]
    for limit, group in limits_of(own_groups() if groups is None else groups):
        used = group.used - max(0, group.inactive_files - mapped)
        found.append(limit - used)
    for kind, used in ((resource.RLIMIT_AS, own.vms), (resource.RLIMIT_DATA, own.data)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found.append(soft - used)
    return max(0, min(found))


def total_memory(device: str, groups: Groups | None = None) -> int:
    """Bytes of a GPU's memory; for a CPU, of the machine's memory or of a smaller cgroup limit."""
    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[1]
    limits = [limit for limit, _ in limits_of(own_groups() if groups is None else groups)]
    return min([psutil.virtual_memory().total, *limits])


@dataclass(frozen=True)
class Group:
    """The memory of one cgroup, version 1 or 2. Each property reads its file anew."""

    folder: Path
    version: int

    @property
    def limit(self) -> int | None:
        """Limit in bytes, or None."""
        text = self._read(("memory.limit_in_bytes", "memory.max"))
        limit = None if text in (None, "max") else int(text or 0)
        return None if limit is None or limit >= UNLIMITED else limit

    @property
    def used(self) -> int:
        """Bytes in use, including cached files."""
        return int(self._read(("memory.usage_in_bytes", "memory.current")) or 0)

    @property
    def inactive_files(self) -> int:
        """Bytes of cached files that Linux frees when memory is needed."""
        statistics = (self._read(("memory.stat", "memory.stat")) or "").split()
        name = ("total_inactive_file", "inactive_file")[self.version - 1]
        return int(statistics[statistics.index(name) + 1]) if name in statistics else 0

    def _read(self, names: tuple[str, str]) -> str | None:
        file = self.folder / names[self.version - 1]
        return file.read_text().strip() if file.is_file() else None


Groups = Sequence[Group]


def own_groups(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[Group]:
    """The cgroups that limit this process's memory: its own and their ancestors."""
    if not own.is_file():  # not Linux
        return []
    groups = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, top = (1, root / "memory") if controllers else (2, root)
        folder = top / path.strip("/")
        groups += [
            Group(place, version)
            for place in (folder, *folder.parents)
            if place.is_relative_to(top) and place.is_dir()
        ]
    return groups


def limits_of(groups: Groups) -> Iterator[tuple[int, Group]]:
    """Yield `(limit, group)` for each group that has a limit."""
    for group in groups:
        if (limit := group.limit) is not None:
            yield limit, group


def watched_devices(configured: str) -> list[str]:
    """Devices with memory metrics: the CPU, and all GPUs unless `configured` is `cpu`."""
    if configured == "cpu" or not torch.cuda.is_available():
        return ["cpu"]
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def kinds(device: str) -> tuple[str, ...]:
    """Return the kinds of memory that `used_bytes` accepts for a device."""
    return KINDS[torch.device(device).type]


def used_bytes(device: str, kind: str) -> float:
    """Bytes of one kind of memory, NaN if the system does not report it."""
    place = torch.device(device)
    found = _of_gpu(kind, place) if place.type == "cuda" else _of_cpu(kind)
    return float("nan") if found is None else float(found)


def _of_gpu(kind: str, device: torch.device) -> int | None:
    if kind == "allocated":
        return torch.cuda.memory_allocated(device)
    if kind == "reserved":
        return torch.cuda.memory_reserved(device)
    if kind == "total":
        return total_memory(str(device))
    return available(str(device), {})


def _of_cpu(kind: str) -> int | None:
    if kind == "allocated":
        return psutil.Process().memory_info().rss
    if kind == "total":
        return total_memory("cpu")
    return available("cpu", {})

"""How much memory the devices have, and how much of it is left."""

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

# A limit of version 1 above this means none.
UNLIMITED = 2**60

# What requests leave of a device's memory: a 16th of it, within these bounds, for what is not
# estimated (messages, the interpreter, the allocator's own losses).
RESERVED = 16
SMALLEST_RESERVE, LARGEST_RESERVE = 64 * 2**20, 2**30

# allocated: tensors, of a CPU the whole process; reserved: kept by torch for further tensors;
# available: left for new ones; total: the device's, of a CPU the container's limit.
KINDS = {
    "cpu": ("allocated", "available", "total"),
    "cuda": ("allocated", "reserved", "available", "total"),
}


def available(device: str, limits: Mapping[str, int]) -> int:
    """The operator's limit for the device if there is one, else what is free."""
    limit = limits.get(device, limits.get(f"{device}:0"))
    return _free(torch.device(device)) if limit is None else limit


def readable_size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def free_for_requests(device: str, needed: float = 0) -> float:
    """Bytes that requests may still take of a device, less a reserve.

    Memory that was freed and not yet given back to the system counts if it is `needed`: it is
    given back then. With `auto` the GPU that has least left is the limit.
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
    """Let the C library return freed memory; without effect where it has no such function."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return free_memory()
    if not torch.cuda.is_available():
        raise ModelFailed("expected a CUDA device, found none that torch can use")
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def free_memory(groups: Groups | None = None) -> int:
    """What this process may still allocate: the least that machine, cgroups and limits leave.

    Pages of mapped files count as free to Linux. Those that this process maps are its models'
    weights, which are read again and again, so they do not count as free here.
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
    """What the device has; of a CPU, the machine's memory or the cgroup's limit if that is less."""
    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[1]
    limits = [limit for limit, _ in limits_of(own_groups() if groups is None else groups)]
    return min([psutil.virtual_memory().total, *limits])


@dataclass(frozen=True)
class Group:
    """The memory of one cgroup, version 1 or 2, read from its folder when it is asked for."""

    folder: Path
    version: int

    @property
    def limit(self) -> int | None:
        """Bytes; None: it has no limit."""
        text = self._read(("memory.limit_in_bytes", "memory.max"))
        limit = None if text in (None, "max") else int(text or 0)
        return None if limit is None or limit >= UNLIMITED else limit

    @property
    def used(self) -> int:
        """Bytes that are charged to it, cached files among them."""
        return int(self._read(("memory.usage_in_bytes", "memory.current")) or 0)

    @property
    def inactive_files(self) -> int:
        """Bytes of cached files that Linux gives back at need."""
        statistics = (self._read(("memory.stat", "memory.stat")) or "").split()
        name = ("total_inactive_file", "inactive_file")[self.version - 1]
        return int(statistics[statistics.index(name) + 1]) if name in statistics else 0

    def _read(self, names: tuple[str, str]) -> str | None:
        file = self.folder / names[self.version - 1]
        return file.read_text().strip() if file.is_file() else None


Groups = Sequence[Group]


def own_groups(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[Group]:
    """The cgroups that bound this process's memory: its own and those above it."""
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
    """Those of the groups that have a limit, with it."""
    for group in groups:
        if (limit := group.limit) is not None:
            yield limit, group


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
        return total_memory(str(device))
    return available(str(device), {})


def _of_cpu(kind: str) -> int | None:
    if kind == "allocated":
        return psutil.Process().memory_info().rss
    if kind == "total":
        return total_memory("cpu")
    return available("cpu", {})

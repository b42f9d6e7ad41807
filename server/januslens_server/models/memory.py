"""How many bytes a model will take, and how many a device has left."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed
from januslens_server.lens.row_cache import ROWS
from januslens_server.models.neuron_index import DEPTH, ENTRY_BYTES, INDEX_BYTES, ROW_BYTES

# Chunks that a request may need at once: its logits, what is made of them, and its vectors.
CHUNKS_AT_WORK = 4

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# A limit of version 1 above this means none.
UNLIMITED = 2**60

# What requests leave of a device's memory: a 16th of it, within these bounds, for what is not
# estimated (messages, the interpreter, the allocator's own losses).
RESERVED = 16
SMALLEST_RESERVE, LARGEST_RESERVE = 64 * 2**20, 2**30


@dataclass(frozen=True)
class Need:
    """Bytes of a model's `weights`, of the `lens`' copies of them, and of a request's `work`.

    Where a CPU computes there is the head `packed` for it, if `lens` is not that copy already,
    and there will be, when requests have asked for them, the logits of the model's `rows`
    (`--row-cache`) and the index of its `neurons`.
    """

    weights: int
    lens: int
    work: int
    packed: int = 0
    rows: int = 0
    neurons: int = 0

    def on(self, device: str) -> Need:
        """What of it comes to stand on the device that computes."""
        return self if device == "cpu" else replace(self, packed=0, rows=0, neurons=0)

    @property
    def beside_weights(self) -> int:
        """What must be left where the weights don't stand alone."""
        return self.lens + self.work + self.packed + self.rows + self.neurons

    @property
    def total(self) -> int:
        """All of it, if it stands on one device."""
        return self.weights + self.beside_weights

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {size(count)}"
            for name, count in (
                ("weights", self.weights),
                ("lens", self.lens + self.packed),
                ("work", self.work),
                ("row cache", self.rows),
                ("neuron index", self.neurons),
            )
        )
        return f"{size(self.total)} ({parts})"


def needed(skeleton: PreTrainedModel, chunk_bytes: int, row_cache_bytes: int) -> Need:
    """From a model without weights (on the meta device), in the data type that it will have.

    The lens and the flow graph compute in float32: of half types they copy the head for good, and
    one block's weights at a time; of float32 a CPU alone copies the head, into another layout.
    """
    rows, neurons = _kept(skeleton, chunk_bytes, row_cache_bytes)
    tensors = [*skeleton.parameters(), *skeleton.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    work = CHUNKS_AT_WORK * chunk_bytes
    copied = torch.float32.itemsize
    head = copied * skeleton.get_output_embeddings().get_parameter("weight").numel()
    if skeleton.dtype is torch.float32:
        return Need(weights, 0, work, head, rows, neurons)
    layers: int = skeleton.config.get_text_config().num_hidden_layers
    block = copied * sum(p.numel() for p in skeleton.parameters()) // layers
    return Need(weights, head, work + block, 0, rows, neurons)


def _kept(skeleton: PreTrainedModel, chunk_bytes: int, row_cache_bytes: int) -> tuple[int, int]:
    """Bytes of the row cache and the neuron index once they are full: upper bounds.

    Before adapters have told the widths, all that is in the blocks' matrices counts as rows of the
    residual's width, and half of them as neurons, which have two matrices or three.
    """
    vocab, d_model = skeleton.get_output_embeddings().get_parameter("weight").shape
    lists = (module for module in skeleton.modules() if isinstance(module, nn.ModuleList))
    in_blocks = {parameter for blocks in lists for parameter in blocks.parameters()}
    rows = sum(parameter.numel() for parameter in in_blocks) // d_model
    logits = torch.float32.itemsize * vocab * rows + max(chunk_bytes, ROWS * 4 * vocab)
    neurons = rows // 2
    index = min(INDEX_BYTES, neurons * ENTRY_BYTES * min(DEPTH, vocab)) + neurons * ROW_BYTES
    return min(row_cache_bytes, logits), index


def available(device: str, limits: Mapping[str, int]) -> int:
    """The operator's limit for the device if there is one, else what is free."""
    limit = limits.get(device, limits.get(f"{device}:0"))
    return _free(torch.device(device)) if limit is None else limit


def size(count: int) -> str:
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

"""How many bytes a model will take, and how many a device has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed

# Chunks that a request may need at once: its logits, what is made of them, and its vectors.
CHUNKS_AT_WORK = 4

CGROUP = Path("/sys/fs/cgroup")
MEMORY_INFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Need:
    """Bytes of a model's `weights`, of the `lens`' copies of them, and of a request's `work`."""

    weights: int
    lens: int
    work: int

    @property
    def total(self) -> int:
        """All of it, if it stands on one device."""
        return self.weights + self.lens + self.work

    def __str__(self) -> str:
        return (
            f"{size(self.total)} (weights {size(self.weights)}, lens {size(self.lens)}, "
            f"work {size(self.work)})"
        )


def needed(skeleton: PreTrainedModel, chunk_bytes: int) -> Need:
    """From a model without weights (on the meta device), in the data type that it will have.

    The lens and the flow graph compute in float32: of half types they copy the head for good, and
    one block's weights at a time; of float32 neither.
    """
    tensors = [*skeleton.parameters(), *skeleton.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    work = CHUNKS_AT_WORK * chunk_bytes
    if skeleton.dtype is torch.float32:
        return Need(weights, lens=0, work=work)
    head = skeleton.get_output_embeddings().get_parameter("weight").numel()
    layers: int = skeleton.config.get_text_config().num_hidden_layers
    block = sum(p.numel() for p in skeleton.parameters()) // layers
    copied = torch.float32.itemsize
    return Need(weights, lens=head * copied, work=work + block * copied)


def available(device: str, limits: Mapping[str, int]) -> int | None:
    """The operator's limit for the device if there is one, else what is free; None: unknown."""
    limit = limits.get(device, limits.get(f"{device}:0"))
    return _free(torch.device(device)) if limit is None else limit


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _free(device: torch.device) -> int | None:
    if device.type != "cuda":
        return free_memory(MEMORY_INFO, CGROUP)
    if not torch.cuda.is_available():
        raise ModelFailed("expected a CUDA device, found none that torch can use")
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def free_memory(memory_info: Path, cgroup: Path) -> int | None:
    """What Linux has for new allocations, or the container's limit leaves if that is less."""
    found = (_of_machine(memory_info, "MemAvailable"), _of_container(cgroup))
    return min((memory for memory in found if memory is not None), default=None)


def total_memory(memory_info: Path, cgroup: Path) -> int | None:
    """What the machine has, or the container's limit if that is less."""
    found = (_of_machine(memory_info, "MemTotal"), _limit_of_container(cgroup))
    return min((memory for memory in found if memory is not None), default=None)


def _of_machine(memory_info: Path, entry: str) -> int | None:
    if not memory_info.is_file():  # no Linux
        return None
    values = dict(line.split(":", 1) for line in memory_info.read_text().splitlines())
    return int(values[entry].split()[0]) * 1024


def _limit_of_container(cgroup: Path) -> int | None:
    """The limit of a version 2 cgroup."""
    limit = cgroup / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return None
    return int(limit.read_text())


def _of_container(cgroup: Path) -> int | None:
    """What the limit leaves; pages of files that nobody uses are given back at need."""
    limit = _limit_of_container(cgroup)
    if limit is None:
        return None
    statistics = (cgroup / "memory.stat").read_text().split()
    reclaimable = int(statistics[statistics.index("inactive_file") + 1])
    used = int((cgroup / "memory.current").read_text()) - reclaimable
    return max(0, limit - used)

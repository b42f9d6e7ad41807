"""How many bytes a model will take, and how many a device has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed
from januslens_server.lens.row_cache import ROWS
from januslens_server.models.neuron_index import DEPTH, ENTRY_BYTES, INDEX_BYTES, ROW_BYTES

# Chunks that a request may need at once: its logits, what is made of them, and its vectors.
CHUNKS_AT_WORK = 4

CGROUP = Path("/sys/fs/cgroup")
MEMORY_INFO = Path("/proc/meminfo")


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

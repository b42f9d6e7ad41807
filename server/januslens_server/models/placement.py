"""Estimate the memory of a model, and choose the devices for its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from torch import nn
from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed, readable_size
from januslens_server.lens.unembedding import multiplies_without_copy
from januslens_server.models.device_memory import available
from januslens_server.models.neuron_index import DEPTH, ENTRY_BYTES, INDEX_BYTES, ROW_BYTES

# The value of `device` that splits a model over the machine's devices.
AUTO = "auto"
DISK = "disk"

# Devices by module name, as accelerate expects them: GPUs by number.
DeviceMap = dict[str, str | int]

# Chunks that a request may need at once: logits, results computed from them, and vectors.
CHUNKS_AT_WORK = 4


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a model needs.

    Attributes:
        weights: The model's parameters and buffers.
        lens: The lens's float32 copy of the output head.
        work: Memory of one request.
        packed: The output head in the CPU's layout, if `lens` is not that copy already.
        rows: Logits of weight rows, cached for later traces (`--row-cache`); CPU only.
        neurons: The neuron index; CPU only.
        gpu_lens: What `lens` is on a GPU, which multiplies by a bfloat16 head as it is.
    """

    weights: int
    lens: int
    work: int
    packed: int = 0
    rows: int = 0
    neurons: int = 0
    gpu_lens: int = 0

    def on(self, device: str) -> MemoryNeed:
        """The part of the need that applies if this device computes."""
        if device == "cpu":
            return self
        return replace(self, lens=self.gpu_lens, packed=0, rows=0, neurons=0)

    @property
    def beside_weights(self) -> int:
        """Bytes needed in addition to the weights."""
        return self.lens + self.work + self.packed + self.rows + self.neurons

    @property
    def total(self) -> int:
        """Bytes needed if everything is on one device."""
        return self.weights + self.beside_weights

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {readable_size(count)}"
            for name, count in (
                ("weights", self.weights),
                ("lens", self.lens + self.packed),
                ("work", self.work),
                ("row cache", self.rows),
                ("neuron index", self.neurons),
            )
        )
        return f"{readable_size(self.total)} ({parts})"


def memory_needed(skeleton: PreTrainedModel, chunk_bytes: int, row_cache_bytes: int) -> MemoryNeed:
    """Estimate the memory of a model from its `skeleton`, the model on the meta device.

    The skeleton has the data type that the weights will have. The lens and the flow graph compute
    in float32: for half types they keep a copy of the output head, and copy one block's weights at
    a time. A GPU needs no copy of a bfloat16 head. For float32 only a CPU copies the head, into
    another layout.
    """
    rows, neurons = _kept(skeleton, row_cache_bytes)
    tensors = [*skeleton.parameters(), *skeleton.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    work = CHUNKS_AT_WORK * chunk_bytes
    copied = torch.float32.itemsize
    head = copied * skeleton.get_output_embeddings().get_parameter("weight").numel()
    if skeleton.dtype is torch.float32:
        return MemoryNeed(weights, 0, work, head, rows, neurons)
    block = copied * _largest_block(skeleton)
    gpu_lens = head
    if torch.cuda.is_available() and multiplies_without_copy(
        torch.device("cuda", torch.cuda.current_device()), skeleton.dtype
    ):
        gpu_lens = 0
    return MemoryNeed(weights, head, work + block, 0, rows, neurons, gpu_lens)


def _largest_block(skeleton: PreTrainedModel) -> int:
    """Return the number of values in the largest block; blocks are in the outermost lists."""
    lists = [module for module in skeleton.modules() if isinstance(module, nn.ModuleList)]
    sizes = (sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks)
    return max(sizes, default=sum(p.numel() for p in skeleton.parameters()))


def _kept(skeleton: PreTrainedModel, row_cache_bytes: int) -> tuple[int, int]:
    """Upper bounds of the bytes of a full row cache and a full neuron index.

    The widths are not known before an adapter runs. So all values of the blocks' matrices count as
    rows of width d_model, and half of these as neurons, which have two or three matrices.
    """
    vocab, d_model = skeleton.get_output_embeddings().get_parameter("weight").shape
    lists = (module for module in skeleton.modules() if isinstance(module, nn.ModuleList))
    in_blocks = {parameter for blocks in lists for parameter in blocks.parameters()}
    rows = sum(parameter.numel() for parameter in in_blocks) // d_model
    logits = torch.float32.itemsize * vocab * rows
    neurons = rows // 2
    index = min(INDEX_BYTES, neurons * ENTRY_BYTES * min(DEPTH, vocab)) + neurons * ROW_BYTES
    return min(row_cache_bytes, logits), index


def place(
    skeleton: PreTrainedModel,
    need: MemoryNeed,
    device: str,
    limits: Mapping[str, int],
    offload_dir: Path | None,
) -> DeviceMap:
    """Choose a device for each module.

    Args:
        skeleton: The model on the meta device.
        need: Its memory, from `memory_needed`.
        device: One device for the whole model. `auto` uses one GPU if the model fits, else all
            GPUs, the CPU and the disk.
        limits: Maximum bytes by device; devices without a limit use their free memory.
        offload_dir: Folder for weights on disk, or None.

    Raises:
        ModelFailed: The model does not fit. The error names the needed and the available memory.
    """
    computing = _computing_devices() if device == AUTO else [device]
    room = {name: available(name, limits) for name in computing}
    for name, free in room.items():
        if need.on(name).total <= free:
            return {"": name}
    if device != AUTO:
        raise ModelFailed(_too_large(need.on(device), room))
    room = {"cpu": available("cpu", limits)} | room
    return _split(skeleton, need, room, computing, offload_dir)


def _computing_devices() -> list[str]:
    """The machine's GPUs, or its CPU if it has none."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def _split(
    skeleton: PreTrainedModel,
    need: MemoryNeed,
    room: Mapping[str, int],
    computing: list[str],
    offload_dir: Path | None,
) -> DeviceMap:
    """Fill the GPUs one after the other, then the CPU, then the disk.

    Every computing device keeps room for the lens and a request, because the device of the output
    head is not known beforehand.
    """
    weights = dict(room)
    for name in computing:
        weights[name] = max(0, weights[name] - need.on(name).beside_weights)
    devices = [*(name for name in computing if name != "cpu"), "cpu"]
    device_map: DeviceMap = infer_auto_device_map(
        skeleton,
        max_memory={_accelerate_name(name): weights[name] for name in devices},
        no_split_module_classes=list(skeleton._no_split_modules or ()),  # noqa: SLF001 - no reader
    )
    if DISK in device_map.values() and offload_dir is None:
        raise ModelFailed(_too_large(need.on(computing[0]), room) + ", or offload to a folder")
    return device_map


def _accelerate_name(device: str) -> str | int:
    return int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device


def _too_large(need: MemoryNeed, room: Mapping[str, int]) -> str:
    found = ", ".join(f"{readable_size(free)} on {name}" for name, free in room.items())
    return (
        f"not enough memory: the model needs {need}, but only {found} is available; "
        "use a smaller data type or a larger device"
    )


def devices_of(network: PreTrainedModel) -> str:
    """Format the devices of the weights, for example `cpu` or `cuda:0, cuda:1, cpu, disk`."""
    placed = getattr(network, "hf_device_map", {"": str(network.device)})
    names = [f"cuda:{d}" if isinstance(d, int) else str(d) for d in placed.values()]
    return ", ".join(dict.fromkeys(names))

"""On which devices a model's weights stand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed
from januslens_server.models.memory import Need, available, size

# The value of `device` that splits a model over what there is.
AUTO = "auto"
DISK = "disk"

# Modules by name and their devices, as accelerate takes them: GPUs by number.
DeviceMap = dict[str, str | int]


def place(
    skeleton: PreTrainedModel,
    need: Need,
    device: str,
    limits: Mapping[str, int],
    offload_dir: Path | None,
) -> DeviceMap:
    """All on one `device`; `auto`: on one GPU, else over all GPUs, the CPU and `offload_dir`.

    Raises `ModelFailed` naming both figures where it does not fit.
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
    """The machine's GPUs, or its CPU."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def _split(
    skeleton: PreTrainedModel,
    need: Need,
    room: Mapping[str, int],
    computing: list[str],
    offload_dir: Path | None,
) -> DeviceMap:
    """Fill the GPUs one after the other, then the CPU, then the disk.

    Every device that computes keeps room for the lens and a request: which of them the head will
    stand on is only known afterwards.
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


def _too_large(need: Need, room: Mapping[str, int]) -> str:
    found = ", ".join(f"{size(free)} on {name}" for name, free in room.items())
    return f"expected {need} of memory, found {found}; use a smaller data type or larger device"


def devices_of(network: PreTrainedModel) -> str:
    """Where the weights stand, for people: `cpu`, or `cuda:0, cuda:1, cpu, disk`."""
    placed = getattr(network, "hf_device_map", {"": str(network.device)})
    names = [f"cuda:{d}" if isinstance(d, int) else str(d) for d in placed.values()]
    return ", ".join(dict.fromkeys(names))

"""Model folders in various states, made from the embedded demo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from januslens_server.demo import model_path

WEIGHTS = "model.safetensors"


def healthy(folder: Path) -> Path:
    """Return a copy of the demo."""
    shutil.copytree(model_path(), folder)
    return folder


def without_weights(folder: Path) -> Path:
    """Return the demo without its weights file."""
    (healthy(folder) / WEIGHTS).unlink()
    return folder


def truncated(folder: Path) -> Path:
    """Return the demo with half of its weights file."""
    weights = healthy(folder) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


def lacking_one_weight(folder: Path) -> Path:
    """Return the demo without one matrix, which transformers alone would draw at random."""
    weights = healthy(folder) / WEIGHTS
    tensors = load_file(weights)
    del tensors["transformer.h.2.mlp.c_fc.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def with_nan(folder: Path) -> Path:
    """Return the demo with one weight that is NaN."""
    weights = healthy(folder) / WEIGHTS
    tensors = load_file(weights)
    tensors["transformer.h.2.mlp.c_fc.weight"][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def in_float32(folder: Path) -> Path:
    """Return the demo in float32, the type that a CPU computes in, at twice the size."""
    weights = healthy(folder) / WEIGHTS
    tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def pickled(folder: Path) -> Path:
    """Return the demo with its weights as a pickle, which is never read."""
    weights = healthy(folder) / WEIGHTS
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def with_configuration(folder: Path, **changes: Any) -> Path:
    """Return the demo with a configuration that does not fit its weights."""
    path = healthy(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def slow_to_load(folder: Path, n_layers: int = 1000) -> Path:
    """Return a folder with a thousand tiny layers, which takes many seconds to load."""
    with_configuration(folder, n_layer=n_layers, n_embd=8, n_head=1)
    widths = {128, 384, 512}
    small = {
        name: value[tuple(slice(side // 16 if side in widths else side) for side in value.shape)]
        for name, value in load_file(folder / WEIGHTS).items()
    }
    first = "transformer.h.0."
    layers = {
        name.replace(first, f"transformer.h.{i}."): value.clone()
        for i in range(n_layers)
        for name, value in small.items()
        if name.startswith(first)
    }
    rest = {name: value.clone() for name, value in small.items() if ".h." not in name}
    save_file(layers | rest, folder / WEIGHTS, metadata={"format": "pt"})
    return folder

"""Serve a LoRA folder beside its base, with one copy of the base's weights.

A LoRA adds `s B A` to the weight W of some linear maps `[d_out, d_in]`, where A is `[r, d_in]` and
B is `[d_out, r]` (Hu et al. 2021, section 4.1). The folder is one that the PEFT library writes:
adapter_config.json and adapter_model.safetensors. It is read here, because PEFT would fetch the
base that the folder names and replace the base's modules.

The model that is served has modules of its own and the base's parameters. Its maps compute
`x W^T + s (x A^T) B^T`, and everything that reads weights reads `W + s B A`.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from januslens_server.errors import ModelFailed, shortlist
from januslens_server.models.adapters import view_of
from januslens_server.models.device_memory import available
from januslens_server.models.loader import weights_hash
from januslens_server.models.matrices import LoraPair
from januslens_server.models.placement import memory_needed
from januslens_server.models.progress import LoadingProgress
from januslens_server.models.resident import ResidentModel
from januslens_server.models.vetting import (
    ADAPTER,
    MAX_COUNT,
    MIB,
    check_folder,
    check_header,
    one_line,
    read_json,
)
from januslens_server.models.wrappers import text_weights

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SIDES = (".lora_A.weight", ".lora_B.weight")
MAX_RANK = 4096
# Characters in the name of a stored matrix.
MAX_NAME = 1000

# Keys of adapter_config.json that are read, that describe how the LoRA was trained, or that choose
# the modules, which the stored weights show. Any other key with a value may change the numbers.
READ = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",  # never fetched: the base is the one that the operator names
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Initialisations of A and B that do not change the base's weights, as others do.
HARMLESS_DRAWS = {True, False, "eva", "gaussian", "orthogonal"}
# Why settings that change more than `s B A` are refused.
REASONS = {
    "modules_to_save": "whole modules were trained with it",
    "use_dora": "DoRA also changes the lengths of a weight's rows, which is no change of low rank",
}
MERGE = (
    "merge the LoRA into the model's weights, with PEFT: python -c \"from peft import "
    "AutoPeftModelForCausalLM as M; M.from_pretrained('FOLDER').merge_and_unload()"
    ".save_pretrained('NEW_FOLDER')\", and copy the tokenizer's files"
)
# Classes of linear maps; Falcon's computes the same as torch's.
LINEAR = {nn.Linear, Conv1D, FalconLinear}
LITERAL = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class Lora:
    """The pairs A and B of a folder by module name, and the folder's hash."""

    pairs: Mapping[str, LoraPair]
    digest: str

    def __str__(self) -> str:
        ranks = sorted({pair.rank for pair in self.pairs.values()})
        maps = sorted({name.rpartition(".")[2] for name in self.pairs})
        return f"rank {', '.join(map(str, ranks))} on {', '.join(maps)}"


def load_lora(
    name: str, folder: Path, base: ResidentModel, progress: LoadingProgress | None = None
) -> ResidentModel:
    """Return a model that computes what `base` with the folder's LoRA computes.

    `progress` is advanced meanwhile.

    Raises:
        ModelFailed: The folder is missing or damaged, or does not fit the base. The error has one
            line.
    """
    try:
        lora = read_lora(folder, _bytes_of(base), progress or LoadingProgress())
        network = _copied(base)
        modules = _changed(base, network, lora)
        _check_room(base, lora)
        for changed, pair in lora.pairs.items():
            _check_finite(changed, pair)
            pair.attach(modules[changed])
        view = view_of(network)
    except (ModelFailed, OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelFailed(f"{folder}: {one_line(error)}") from error
    revision = hashlib.sha256(f"{base.provenance.revision} {lora.digest}".encode()).hexdigest()
    return replace(
        base,
        name=name,
        network=network,
        view=replace(view, lens=base.view.lens),  # the output head is the base's
        provenance=replace(
            base.provenance,
            model=name,
            revision=revision,
            lora=f"{lora}, over the model {base.name}",
        ),
    )


def _bytes_of(base: ResidentModel) -> int:
    return sum(p.numel() * p.element_size() for p in base.network.parameters())


def read_lora(folder: Path, limit: int, progress: LoadingProgress) -> Lora:
    """Read, check and hash a LoRA folder with at most `limit` bytes of weights.

    The weights are mapped from their file, and their values not yet read, except for the hash.

    Raises:
        ModelFailed: The folder describes more than pairs A and B, or they do not fit together.
    """
    if not folder.is_dir():
        raise ModelFailed("the folder does not exist; expected a LoRA folder of PEFT")
    check_folder(folder)
    for file in (ADAPTER, WEIGHTS):
        if not (folder / file).is_file():
            raise ModelFailed(f"file {file!r} is missing: expected a LoRA folder of PEFT")
    described = read_json(folder / ADAPTER)
    _check_described(described)
    check_header(folder / WEIGHTS)
    size = (folder / WEIGHTS).stat().st_size
    if size > limit + MIB:
        raise ModelFailed(f"{WEIGHTS} has {size} bytes: expected fewer than its base, {limit}")
    tensors = load_file(folder / WEIGHTS)
    progress.finish_pass()
    names = {key: _module_name(key) for key in tensors}
    if unknown := sorted(key for key, name in names.items() if name is None):
        raise ModelFailed(
            f"{WEIGHTS} has weights that are not LoRA matrices of linear maps: "
            f"{shortlist(unknown)}; {MERGE}"
        )
    modules = sorted({name for name in names.values() if name is not None})
    if not modules:
        raise ModelFailed(f"{WEIGHTS} has no weights: expected A and B of some linear maps")
    ranks = _Setting(described, "r", "rank_pattern")
    alphas = _Setting(described, "lora_alpha", "alpha_pattern")
    pairs = {}
    for module in modules:
        rank = ranks.of(module)
        down, up = _matrices(module, tensors, rank)
        divisor = math.sqrt(rank) if described.get("use_rslora") else rank
        pairs[module] = LoraPair(down, up, alphas.of(module) / divisor)
    progress.finish_pass()
    digest = weights_hash(folder, (ADAPTER, WEIGHTS), progress.advance)
    progress.finish_pass()
    return Lora(pairs, digest)


def _check_described(described: Mapping[str, Any]) -> None:
    kind = described.get("peft_type")
    if kind != "LORA":
        raise ModelFailed(f"{ADAPTER} describes {kind!r}: expected LORA; {MERGE}")
    unread = sorted(k for k, value in described.items() if value and k not in READ | IGNORED)
    if unread:
        reasons = "".join(f": {REASONS[key]}" for key in unread if key in REASONS)
        raise ModelFailed(
            f"{ADAPTER} has settings that are not read: {shortlist(unread)}{reasons}; {MERGE}"
        )
    if described.get("bias", "none") != "none":
        raise ModelFailed(f"{ADAPTER} trains biases; {MERGE}")
    drawn = described.get("init_lora_weights", True)
    if not isinstance(drawn, bool | str) or drawn not in HARMLESS_DRAWS:
        raise ModelFailed(
            f"{ADAPTER} changes the base's weights with init_lora_weights {drawn!r}: convert the "
            "LoRA to one of the original base"
        )


def _module_name(key: str) -> str | None:
    """The name of the module that a stored matrix belongs to; None for other weights."""
    for side in SIDES:
        if key.startswith(PREFIX) and key.endswith(side) and len(key) <= MAX_NAME:
            return key.removeprefix(PREFIX).removesuffix(side)
    return None


def _matrices(
    module: str, tensors: Mapping[str, torch.Tensor], rank: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a module; refuse them if they do not have this rank."""
    keys = [f"{PREFIX}{module}{side}" for side in SIDES]
    for key in keys:
        if key not in tensors:
            raise ModelFailed(f"{WEIGHTS} lacks {key!r}: expected A and B of every module")
        if tensors[key].dim() != 2 or not tensors[key].is_floating_point():
            raise ModelFailed(f"tensor {key!r} is not a matrix of floating-point numbers")
    down, up = (tensors[key] for key in keys)
    if not 1 <= rank <= MAX_RANK or rank != down.shape[0] or rank != up.shape[1]:
        raise ModelFailed(
            f"the LoRA of {module!r} has A {list(down.shape)} and B {list(up.shape)}: expected "
            f"rank {rank:g}, at most {MAX_RANK}"
        )
    return down, up


class _Setting:
    """A number for all modules, `key`, and other numbers for some of them, `pattern`.

    PEFT reads the names of modules in a pattern as regular expressions, of which the first counts.
    """

    def __init__(self, described: Mapping[str, Any], key: str, pattern: str) -> None:
        self._key, self._default = key, described.get(key)
        self._own = described.get(pattern) or {}
        named = isinstance(self._own, Mapping) and len(self._own) <= MAX_COUNT
        if not named or not all(LITERAL.fullmatch(name) for name in self._own):
            raise ModelFailed(
                f"{ADAPTER}: invalid {pattern}: expected names of modules, at most {MAX_COUNT}"
            )
        self._order = {name: place for place, name in enumerate(self._own)}

    def of(self, module: str) -> float:
        """The number for one module, whose name ends with that in the pattern."""
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        named = [end for end in ends if end in self._order]
        found = self._own[min(named, key=self._order.__getitem__)] if named else self._default
        if isinstance(found, bool) or not isinstance(found, int | float) or not _is_finite(found):
            raise ModelFailed(f"{ADAPTER}: invalid {self._key} {found!r}: expected a number")
        return found


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond floats
        return False


def _copied(base: ResidentModel) -> Any:
    """Copy the base's modules, but not its parameters."""
    if len(set(getattr(base.network, "hf_device_map", {"": ""}).values())) > 1:
        raise ModelFailed(
            f"the base {base.name!r} is split over devices: expected one device; {MERGE}"
        )
    shared = chain(base.network.parameters(), base.network.buffers())
    return copy.deepcopy(base.network, {id(tensor): tensor for tensor in shared})


def _changed(base: ResidentModel, network: Any, lora: Lora) -> dict[str, nn.Module]:
    """Return the modules that the LoRA changes; refuse any but linear maps of its shapes."""
    head = network.get_output_embeddings()
    inside = " in " in base.provenance.architecture  # a multimodal model, whose names PEFT stored
    own = {name: name for name in lora.pairs}
    found = {}
    for name, stored in (text_weights(own, network.config) if inside else own).items():
        module = _submodule(network, name)
        if module is None or module is head or type(module) not in LINEAR:
            raise ModelFailed(
                f"the LoRA changes {name!r}, which is not a linear map in a block of the base "
                f"{base.name!r}; {MERGE}"
            )
        lora.pairs[stored].check_shapes(module)
        found[stored] = module
    return found


def _check_finite(name: str, pair: LoraPair) -> None:
    if not all(bool(matrix.isfinite().all()) for matrix in (pair.down, pair.up)):
        raise ModelFailed(f"the LoRA of {name!r} has values that are infinite or NaN")


def _submodule(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def _check_room(base: ResidentModel, lora: Lora) -> None:
    """Refuse a LoRA without memory for what is not shared with the base."""
    device = base.network.device.type
    caches = memory_needed(base.network, base.view.lens.chunk_bytes, base.row_cache_bytes)
    kept = caches.on(device).rows + caches.on(device).neurons
    width = base.network.dtype.itemsize
    need = kept + width * sum(p.down.numel() + p.up.numel() for p in lora.pairs.values())
    if need > (free := available(str(base.network.device), {})):
        raise ModelFailed(
            f"not enough memory: the LoRA and its caches need {need // MIB} MiB, but only "
            f"{free // MIB} MiB are available; use a smaller --row-cache"
        )

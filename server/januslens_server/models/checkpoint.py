"""What a model's folder holds, read and judged before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from januslens_server.errors import ModelFailed
from januslens_server.models.vetting import (
    check_file_names,
    check_folder,
    check_header,
    online,
    read_json,
)

# Any of these holds a tokenizer's entries. Without them transformers makes up an empty one.
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
# Everything of a hub repository but its weights.
DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be loaded: its configuration, and the commit if it came from the hub.

    `weight_files` are names in the folder, `stored` the number of values of each tensor in them.
    """

    folder: Path
    config: PreTrainedConfig
    commit: str | None
    weight_files: tuple[str, ...]
    stored: Mapping[str, int]


def open_checkpoint(location: str, revision: str | None) -> Checkpoint:
    """Find the folder, or fetch it from the hub: its description first, the weights if that is fit.

    Raises `ModelFailed` with the one thing that keeps the model from being loaded exactly.
    """
    local = Path(location).expanduser()
    is_local = local.is_dir()
    folder = local if is_local else _fetched(location, revision, DESCRIPTIONS)
    if not (folder / "config.json").is_file():
        raise ModelFailed("expected a model with a config.json, found none")
    check_folder(folder)
    _refuse_custom_code(read_json(folder / "config.json"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _refuse_other_tasks(config)
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        raise ModelFailed("expected a tokenizer (tokenizer.json), found none")
    names = _weight_files(folder)
    if not is_local:
        _fetched(location, revision, names)
        check_folder(folder)
    stored: dict[str, int] = {}
    for name in names:
        stored |= _read_header(folder, name)
    return Checkpoint(folder, config, None if is_local else folder.name, tuple(names), stored)


def _fetched(location: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        with online():
            return Path(snapshot_download(location, revision=revision, allow_patterns=list(files)))
    except (OSError, HFValidationError) as error:
        wanted = "a local folder or a model of the hub"
        raise ModelFailed(f"expected {wanted}, found neither: {first_line(error)}") from error


def _refuse_custom_code(described: Mapping[str, Any]) -> None:
    family = described.get("model_type")
    if described.get("auto_map") and family not in CONFIG_MAPPING:
        raise ModelFailed(
            f"expected an architecture that transformers knows, got {family!r}, which brings code "
            "of its own; such code is never run"
        )


def _refuse_other_tasks(config: PreTrainedConfig) -> None:
    found = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelFailed(f"expected a decoder-only model, got an encoder-decoder: {found}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFailed(f"expected a causal language model, got {found}, which has none")
    if config.get_text_config().num_hidden_layers < 1:
        raise ModelFailed("expected at least one layer, got none")
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for name in config.architectures or ():
        if "For" in name and not name.endswith("ForCausalLM") and name not in causal:
            raise ModelFailed(f"expected a causal language model, got {name}")


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files' names, from their index if there is one."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [SAFE_WEIGHTS_NAME]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ModelFailed(f"expected a weight_map in {index.name}, found none")
    return check_file_names(list(names.values()), index.name)


def _read_header(folder: Path, name: str) -> dict[str, int]:
    """The number of values of every tensor in a weights file.

    Refuses a file that is missing, cut, or holds weights that are not plain floats.
    """
    if not (folder / name).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        unread = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
        raise ModelFailed(f"expected weights in safetensors, found no file named {name}{unread}")
    check_header(folder / name)
    stored: dict[str, int] = {}
    try:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_slice(key)
                kind = tensor.get_dtype()
                if key.endswith("weight") and kind not in FLOATS:
                    raise ModelFailed(f"expected weights in float formats, got {key} in {kind}")
                stored[key] = math.prod(tensor.get_shape())
    except safetensors.SafetensorError as error:
        size = (folder / name).stat().st_size
        raise ModelFailed(
            f"expected {name} in safetensors, got {size} bytes that are not: {error}"
        ) from error
    return stored


def first_line(error: Exception) -> str:
    """The error's text without transformers' advice."""
    return str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__

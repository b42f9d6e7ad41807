"""What a model's folder holds, read and judged before any weight is loaded."""

from __future__ import annotations

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

# Any of these holds a tokenizer's entries. Without them transformers makes up an empty one.
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
# Everything of a hub repository but its weights.
DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be loaded: its configuration, and the commit if it came from the hub."""

    folder: Path
    config: PreTrainedConfig
    commit: str | None


def open_checkpoint(location: str, revision: str | None) -> Checkpoint:
    """Find the folder, or fetch it from the hub: its description first, the weights if that is fit.

    Raises `ModelFailed` with the one thing that keeps the model from being loaded exactly.
    """
    local = Path(location).expanduser()
    is_local = local.is_dir()
    folder = local if is_local else _fetched(location, revision, DESCRIPTIONS)
    if not (folder / "config.json").is_file():
        raise ModelFailed("expected a model with a config.json, found none")
    described, _ = PreTrainedConfig.get_config_dict(folder)
    _refuse_custom_code(described)
    _refuse_quantised(described)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _refuse_other_tasks(config)
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        raise ModelFailed("expected a tokenizer (tokenizer.json), found none")
    names = _weight_files(folder)
    if not is_local:
        _fetched(location, revision, names)
    for name in names:
        _read_header(folder, name)
    return Checkpoint(folder, config, None if is_local else folder.name)


def _fetched(location: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
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


def _refuse_quantised(described: Mapping[str, Any]) -> None:
    quantisation = described.get("quantization_config") or described.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method", "an unnamed method")
        raise ModelFailed(
            f"expected weights in float32, bfloat16 or float16, got a checkpoint quantised by "
            f"{method}, of whose numbers nothing is proven; serve the one that it was made from"
        )


def _refuse_other_tasks(config: PreTrainedConfig) -> None:
    found = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelFailed(f"expected a decoder-only model, got an encoder-decoder: {found}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFailed(f"expected a causal language model, got {found}, which has none")
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for name in config.architectures or ():
        if "For" in name and not name.endswith("ForCausalLM") and name not in causal:
            raise ModelFailed(f"expected a causal language model, got {name}")


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files' names, from their index if there is one."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [SAFE_WEIGHTS_NAME]
    described, _ = PreTrainedConfig.get_config_dict(folder, _configuration_file=index.name)
    names = described.get("weight_map")
    if not isinstance(names, dict):
        raise ModelFailed(f"expected a weight_map in {index.name}, found none")
    return sorted(set(names.values()))


def _read_header(folder: Path, name: str) -> None:
    """Refuse a file that is missing, cut, or holds weights that are not plain floats."""
    if not (folder / name).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        unread = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
        raise ModelFailed(f"expected weights in safetensors, found no file named {name}{unread}")
    try:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                stored = file.get_slice(key).get_dtype()
                if key.endswith("weight") and stored not in FLOATS:
                    raise ModelFailed(f"expected weights in float formats, got {key} in {stored}")
    except safetensors.SafetensorError as error:
        size = (folder / name).stat().st_size
        raise ModelFailed(
            f"expected {name} in safetensors, got {size} bytes that are not: {error}"
        ) from error


def first_line(error: Exception) -> str:
    """The error's text without transformers' advice."""
    return str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__

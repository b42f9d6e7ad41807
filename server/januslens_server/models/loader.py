"""Load a model from a local folder or the hub: safetensors only, no remote code."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from januslens_server.errors import ModelFailed
from januslens_server.lens.head import CHUNK_BYTES
from januslens_server.models.adapters import view_of
from januslens_server.models.failures import check_weights
from januslens_server.models.matrices import loaded_vectors
from januslens_server.models.placement import (
    AUTO,
    DISK,
    DeviceMap,
    devices_of,
    memory_needed,
    place,
)
from januslens_server.models.resident import ROW_CACHE_BYTES, ResidentModel
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.models.tokenizer_files import read_vocabulary
from januslens_server.models.vetting import (
    check_file_names,
    check_folder,
    check_header,
    check_sizes,
    limited_construction,
    online,
    read_json,
)
from januslens_server.results import Provenance

# Any of these holds a tokenizer's entries. Without them transformers makes up an empty one.
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")

# Everything of a hub repository but its weights.
DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
FLOATS = {"F64", "F32", "F16", "BF16"}
logger = logging.getLogger(__name__)


# A server's log is no terminal.
transformers_logging.disable_progress_bar()


DATA_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelSource:
    """What to load: a local folder or hub id, its `revision` on the hub, and how.

    `device` `auto` splits a model over the machine's devices and, for what fits nowhere, the
    `offload_dir`. `limits` are bytes that the model may take by device, else what is free. `cache`
    keeps what is computed once per model, `row_cache_bytes` of logits what traces may meet again.
    `chunk_bytes` of logits are held at once.
    """

    name: str
    location: str
    revision: str | None = None
    device: str = "cpu"
    data_type: str = "auto"
    limits: Mapping[str, int] = field(default_factory=dict)
    offload_dir: Path | None = None
    cache: TensorCache | None = None
    row_cache_bytes: int = ROW_CACHE_BYTES
    chunk_bytes: int = CHUNK_BYTES


def load(source: ModelSource) -> ResidentModel:
    """Load weights, tokenizer and adapter.

    Raises `ModelFailed` with what was found where the model is missing, broken, quantised, not in
    safetensors, no causal language model, too large, or of an architecture without an adapter.
    """
    try:
        checkpoint = open_checkpoint(source.location, source.revision)
        network = _network(source, checkpoint)
        vocabulary = read_vocabulary(checkpoint.folder)
        with loaded_vectors(network):
            view = view_of(network)
        check_weights(network)
        view = replace(view, lens=replace(view.lens, chunk_bytes=source.chunk_bytes))
    except (ModelFailed, OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelFailed(f"{source.location}: {first_line(error)}") from error
    except Exception as error:  # a hostile folder can break transformers anywhere
        logger.debug("model %s broke while it was loaded", source.name, exc_info=True)
        reason = f"cannot be loaded: {type(error).__name__}: {first_line(error)}"
        raise ModelFailed(f"{source.location}: {reason}") from error
    return ResidentModel(
        name=source.name,
        network=network,
        view=view,
        vocabulary=vocabulary,
        provenance=_provenance(source, checkpoint, network),
        cache=source.cache,
        row_cache_bytes=source.row_cache_bytes,
    )


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


def _network(source: ModelSource, checkpoint: Checkpoint) -> PreTrainedModel:
    """The frozen model, in evaluation mode."""
    data_type = _data_type(source, checkpoint)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=checkpoint.config,
        generation_config=GenerationConfig(),  # the folder's is not read
        trust_remote_code=False,
        local_files_only=True,
        dtype=data_type,
        device_map=_device_map(source, checkpoint, data_type),
        offload_folder=None if source.offload_dir is None else source.offload_dir / source.name,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # refused below, in one line
        output_loading_info=True,
    )
    network, found = loaded
    for key, stored, expected in sorted(found["mismatched_keys"]):
        raise ModelFailed(f"expected {key} of shape {list(expected)}, got {list(stored)}")
    if missing := sorted(found["missing_keys"]):  # transformers has drawn them at random
        raise ModelFailed(
            f"expected every weight, got none for {len(missing)} parameters: "
            + ", ".join(missing[:3])
        )
    if unused := _unused(network, found["unexpected_keys"]):
        raise ModelFailed(
            f"the checkpoint holds {len(unused)} weights that the configuration has no place for: "
            f"{', '.join(unused[:3])}; correct config.json, or merge or remove these weights"
        )
    network.requires_grad_(requires_grad=False)
    frozen: PreTrainedModel = network.eval()
    return frozen


def _unused(network: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """The stored weights that would change the output if the model had a place for them.

    transformers has left out what its model class declares to be ignorable. Also left out: layers
    beyond the configuration's last one (cut models, heads that predict several tokens), and masks
    and frequencies that the model computes itself.
    """
    n_layers: int = network.config.get_text_config().num_hidden_layers
    computed = {name for name, _ in network.named_buffers()}

    def used(key: str) -> bool:
        number = re.search(r"\.(\d+)\.", key)
        beyond = number is not None and int(number[1]) >= n_layers
        return beyond or key in computed or key.endswith(("inv_freq", "masked_bias"))

    return sorted(key for key in keys if not used(key))


def _device_map(source: ModelSource, checkpoint: Checkpoint, data_type: torch.dtype) -> DeviceMap:
    """Where the weights will stand; raises `ModelFailed` before they are read if nowhere."""
    with torch.device("meta"), limited_construction(len(checkpoint.stored)):
        skeleton: Any = AutoModelForCausalLM.from_config(checkpoint.config, dtype=data_type)
    check_sizes(skeleton, checkpoint.stored)
    need = memory_needed(skeleton, source.chunk_bytes, source.row_cache_bytes)
    device_map = place(skeleton, need, source.device, source.limits, source.offload_dir)
    devices = list(dict.fromkeys(str(device) for device in device_map.values()))
    computing = next((device for device in devices if device not in {"cpu", DISK}), "cpu")
    need = need.on(computing)
    logger.info("model %s takes about %s on %s", source.name, need, ", ".join(devices))
    return device_map


def _data_type(source: ModelSource, checkpoint: Checkpoint) -> torch.dtype:
    """`auto` is the checkpoint's own type, but float32 on a CPU, where half is slow and coarse."""
    if source.data_type != "auto":
        return DATA_TYPES[source.data_type]
    on_cpu = source.device == "cpu" or (source.device == AUTO and not torch.cuda.is_available())
    own = str(checkpoint.config.dtype).removeprefix("torch.")
    return torch.float32 if on_cpu else DATA_TYPES.get(own, torch.float32)


def _provenance(
    source: ModelSource, checkpoint: Checkpoint, network: PreTrainedModel
) -> Provenance:
    return Provenance(
        model=source.name,
        revision=checkpoint.commit or weights_hash(checkpoint.folder, checkpoint.weight_files),
        architecture=type(network).__name__,
        data_type=str(network.dtype).removeprefix("torch."),
        device=devices_of(network),
        attention=str(network.config._attn_implementation),  # noqa: SLF001 - no public reader
        versions={
            "januslens": _own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _own_version() -> str:
    try:
        return version("januslens")
    except PackageNotFoundError:  # run from a folder that was not installed
        return "unknown"


def weights_hash(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over the named weights files of the folder, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

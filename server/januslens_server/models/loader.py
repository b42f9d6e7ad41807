"""Load a model from a folder, a GGUF file or the hub: no pickles, no remote code."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils.tqdm import tqdm
from safetensors import safe_open
from torch import nn
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

from januslens_server.errors import ModelFailed, shortlist
from januslens_server.lens.head import CHUNK_BYTES
from januslens_server.models.adapters import view_of
from januslens_server.models.failures import check_weights
from januslens_server.models.gguf_file import GGUFHeader, read_header
from januslens_server.models.gguf_model import read_configuration, read_weights
from januslens_server.models.gguf_tokenizer import read_gguf_vocabulary
from januslens_server.models.matrices import loaded_vectors
from januslens_server.models.placement import (
    AUTO,
    DISK,
    DeviceMap,
    devices_of,
    memory_needed,
    place,
)
from januslens_server.models.progress import LoadingProgress, reading_weights
from januslens_server.models.quantization_scheme import read_scheme
from januslens_server.models.quantized import (
    DenseWeight,
    TensorEntry,
    check_float,
    dense_weights,
)
from januslens_server.models.resident import ROW_CACHE_BYTES, ResidentModel
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.models.tokenizer_files import read_vocabulary
from januslens_server.models.vetting import (
    ADAPTER,
    QUANTIZATION_KEYS,
    check_file_names,
    check_folder,
    check_header,
    check_sizes,
    compute_attention_with_torch,
    limited_construction,
    one_line,
    online,
    read_json,
)
from januslens_server.models.wrappers import dense_text_weights, text_decoder, wrapper_name
from januslens_server.results import Provenance

# Files with a tokenizer's vocabulary. Without any, transformers creates an empty tokenizer.
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")

# Files of a hub repository except its weights.
DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
# Bytes of a file that are read and hashed at once.
HASHED_BYTES = 2**20

# Stored tensors without effect on the logits of the next token: those that the model computes
# itself, and heads that predict further tokens.
NOT_IN_OUTPUT = re.compile(r"inv_freq$|masked_bias$|position_ids$|(^|\.)mtp[._]")
logger = logging.getLogger(__name__)


# Keep progress bars out of the log.
transformers_logging.disable_progress_bar()


DATA_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelSource:
    """What to load, and how.

    Attributes:
        name: The model's name in requests.
        location: A local folder or the id of a hub repository.
        revision: Branch, tag or commit on the hub.
        device: A device; `auto` splits a model over the machine's devices and `offload_dir`.
        data_type: A key of `DATA_TYPES`, or `auto`.
        limits: Maximum bytes by device; devices without a limit use their free memory.
        offload_dir: Folder for weights that fit on no device.
        cache: Cache for tensors that are computed once per model.
        row_cache_bytes: Maximum bytes of cached logits of weight rows.
        chunk_bytes: Bytes of logits that are computed at once.
        lora: A LoRA folder; `location` is then the name of the model that it changes.
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
    lora: Path | None = None


def load(source: ModelSource, progress: LoadingProgress | None = None) -> ResidentModel:
    """Load a model: its weights, tokenizer and view. `progress` is advanced meanwhile.

    Raises:
        ModelFailed: The model is missing, broken, in another format, not a causal
            language model, too large, or of an unknown structure. The error has one line.
    """
    progress = progress or LoadingProgress()
    try:
        checkpoint = open_checkpoint(source.location, source.revision, progress.alive)
        with reading_weights(progress):
            network = _network(source, checkpoint)
        vocabulary = _vocabulary(checkpoint)
        with loaded_vectors(network):
            view = view_of(network)
        check_weights(network, progress.advance)
        progress.finish_pass()
        view = replace(view, lens=replace(view.lens, chunk_bytes=source.chunk_bytes))
    except (
        ModelFailed,
        OSError,
        ValueError,
        RuntimeError,
        StrictDataclassError,
        safetensors.SafetensorError,
    ) as error:
        raise ModelFailed(f"{source.location}: {one_line(error)}") from error
    except Exception as error:  # a hostile folder can raise anything in transformers
        logger.debug("model %s broke while it was loaded", source.name, exc_info=True)
        gguf = Path(source.location).suffix == ".gguf"
        described = "the file's settings" if gguf else "config.json"
        reason = f"transformers cannot build the model from {described}: {one_line(error)}"
        raise ModelFailed(f"{source.location}: {reason}") from error
    return ResidentModel(
        name=source.name,
        network=network,
        view=view,
        vocabulary=vocabulary,
        provenance=_provenance(source, checkpoint, network, progress),
        cache=source.cache,
        row_cache_bytes=source.row_cache_bytes,
        end_ids=_end_ids(checkpoint, network),
    )


def _vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    if checkpoint.gguf is not None:
        return read_gguf_vocabulary(checkpoint.gguf)
    return read_vocabulary(checkpoint.folder)


def _end_ids(checkpoint: Checkpoint, network: PreTrainedModel) -> frozenset[int]:
    """Return the ids of `eos_token_id` in generation_config.json, or else in the configuration."""
    file = checkpoint.folder / "generation_config.json"
    described = checkpoint.gguf is None and file.is_file()
    found = read_json(file).get("eos_token_id") if described else None
    if found is None:
        found = getattr(network.config.get_text_config(), "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return frozenset(token_id for token_id in listed if type(token_id) is int)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that passed all checks.

    `commit` is None unless the folder is a download from the hub. `weight_files` are names in the
    folder, `stored` is the number of values of each weight in them. `gguf` is the header of the
    single weights file if it is in this format. `dense` are the weights if safetensors store them
    quantised, or under the names of a multimodal model. `quantization` names the scheme, `wrapper`
    the class of the multimodal model.
    """

    folder: Path
    config: PreTrainedConfig
    commit: str | None
    weight_files: tuple[str, ...]
    stored: Mapping[str, int]
    gguf: GGUFHeader | None = None
    dense: Mapping[str, DenseWeight] | None = None
    quantization: str = ""
    wrapper: str = ""


def open_checkpoint(
    location: str, revision: str | None, downloaded: Callable[[], object] = lambda: None
) -> Checkpoint:
    """Find a local folder, or download it from the hub: the weights only after checking the rest.

    `downloaded` is called when parts of files have arrived.

    Raises:
        ModelFailed: The model cannot be loaded exactly. The error names the first reason.
    """
    local = Path(location).expanduser()
    is_local = local.is_dir()
    if local.suffix == ".gguf":
        return _open_gguf(local)
    if not is_local and location.startswith((".", "/", "~")):  # a path, not a hub id
        raise ModelFailed("the folder does not exist; expected a model folder with config.json")
    folder = local if is_local else _fetched(location, revision, DESCRIPTIONS, downloaded)
    if not (folder / "config.json").is_file():
        files = sorted(path.name for path in folder.glob("*.gguf"))
        advice = f"; to serve the GGUF file {files[0]!r}, add its name to the path" if files else ""
        raise ModelFailed(
            f"config.json is missing: expected a model folder of transformers{advice}"
        )
    check_folder(folder)
    described = read_json(folder / "config.json")
    _refuse_custom_code(described)
    scheme = read_scheme(described)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _forget_quantisation(config)
    whole, config = config, text_decoder(config) or config
    compute_attention_with_torch(config)
    _refuse_other_tasks(config)
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        raise ModelFailed("the tokenizer is missing: expected tokenizer.json")
    names = _weight_files(folder)
    if not is_local:
        _fetched(location, revision, names, downloaded)
        check_folder(folder)
    entries: dict[str, TensorEntry] = {}
    for name in names:
        entries |= _read_header(folder, name)
    dense = None
    if scheme is not None or config is not whole:
        dense = dense_weights(folder, entries, scheme)
    else:
        check_float(entries)
    if config is not whole and dense is not None:
        dense = dense_text_weights(dense, config)
        config.tie_word_embeddings = "lm_head.weight" not in dense
    return Checkpoint(
        folder=folder,
        config=config,
        commit=None if is_local else folder.name,
        weight_files=tuple(names),
        stored={name: tensor.size for name, tensor in (dense or entries).items()},
        dense=dense,
        quantization="" if scheme is None else scheme.name,
        wrapper="" if config is whole else wrapper_name(whole),
    )


def _open_gguf(path: Path) -> Checkpoint:
    if find_spec("gguf") is None:
        raise ModelFailed(
            "reading a GGUF file needs the package 'gguf', which is not installed: run "
            "pip install 'januslens[server]'"
        )
    header = read_header(path)
    config = read_configuration(header)
    stored = {tensor.name: tensor.size for tensor in header.tensors.values()}
    return Checkpoint(
        folder=path.parent,
        config=config,
        commit=None,
        weight_files=(path.name,),
        stored=stored,
        gguf=header,
        quantization=header.quantization,
    )


def _fetched(
    location: str, revision: str | None, files: Sequence[str], downloaded: Callable[[], object]
) -> Path:
    class Reported(tqdm):
        """The bars of a download, which the library updates with the bytes that arrive."""

        def update(self, n: float | None = 1) -> bool | None:
            downloaded()
            shown: bool | None = super().update(n)
            return shown

    try:
        with online():
            found = snapshot_download(
                location,
                revision=revision,
                allow_patterns=list(files),
                tqdm_class=Reported,
                # Versions before 2 ask the hub for the files of a commit even if it is cached.
                local_files_only=is_offline_mode(),
            )
            return Path(found)
    except (OSError, HFValidationError) as error:
        raise ModelFailed(
            f"not found: expected a folder or the id of a hub model ({one_line(error)})"
        ) from error


def _refuse_custom_code(described: Mapping[str, Any]) -> None:
    family = described.get("model_type")
    if described.get("auto_map") and family not in CONFIG_MAPPING:
        raise ModelFailed(
            f"architecture {family!r} needs custom code, which is never run: expected an "
            "architecture that transformers includes"
        )


def _forget_quantisation(config: PreTrainedConfig) -> None:
    """Let transformers load dense weights, because they are dequantised before it sees them."""
    for part in (config, config.get_text_config()):
        for key in QUANTIZATION_KEYS:
            vars(part).pop(key, None)


def _refuse_other_tasks(config: PreTrainedConfig) -> None:
    found = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelFailed(f"{found!r} is an encoder-decoder: expected a decoder-only model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFailed(
            f"{found!r} is not a type of AutoModelForCausalLM in transformers: expected a causal "
            "language model"
        )
    text = config.get_text_config()
    if (parts := sorted(text.sub_configs)) and not hasattr(text, "num_hidden_layers"):
        raise ModelFailed(
            f"{found!r} is made of several models ({', '.join(parts)}): expected one list of "
            "blocks that pass on one residual stream"
        )
    if text.num_hidden_layers < 1:
        raise ModelFailed("config.json describes a model without layers: expected at least one")
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for name in config.architectures or ():
        if "For" in name and not name.endswith("ForCausalLM") and name not in causal:
            raise ModelFailed(
                f"{name!r} is not a class of AutoModelForCausalLM in transformers: expected a "
                "causal language model"
            )


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files: those of the index, unless there is a single file."""
    listed = [SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ModelFailed(f"{index.name} has no weight_map: expected the file of each tensor")
        listed = check_file_names(list(names.values()), index.name)
    return [SAFE_WEIGHTS_NAME] if (folder / SAFE_WEIGHTS_NAME).is_file() else listed


def _read_header(folder: Path, name: str) -> dict[str, TensorEntry]:
    """Return every tensor in a weights file. Refuses a file that is missing or truncated."""
    if not (folder / name).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        advice = ""
        if pickles:
            advice = f"; {pickles[0]!r} is a pickle, which is never read: convert it to safetensors"
        if (folder / ADAPTER).exists():
            advice = f"; {ADAPTER} describes an adapter: merge it into the model's weights"
        raise ModelFailed(f"file {name!r} is missing: expected weights in safetensors{advice}")
    check_header(folder / name)
    entries: dict[str, TensorEntry] = {}
    try:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_slice(key)
                entries[key] = TensorEntry(name, tensor.get_dtype(), tuple(tensor.get_shape()))
    except safetensors.SafetensorError as error:
        size = (folder / name).stat().st_size
        raise ModelFailed(
            f"{name!r} ({size} bytes) is not a valid safetensors file: {error}"
        ) from error
    return entries


def _network(source: ModelSource, checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the model, frozen and in evaluation mode."""
    data_type = _data_type(source, checkpoint)
    skeleton = _skeleton(checkpoint, data_type)
    device_map = _device_map(source, skeleton)
    where: dict[str, Any] = {"pretrained_model_name_or_path": checkpoint.folder}
    if (header := checkpoint.gguf) is not None:
        read = read_weights(header, skeleton, data_type)
        where = {"pretrained_model_name_or_path": None, "state_dict": read}
    elif checkpoint.dense is not None:
        dense = {n: replace(w, data_type=data_type) for n, w in checkpoint.dense.items()}
        where = {"pretrained_model_name_or_path": None, "state_dict": dense}
    loaded: Any = type(skeleton).from_pretrained(
        **where,
        config=checkpoint.config,
        generation_config=GenerationConfig(),  # the folder's is not read
        trust_remote_code=False,
        local_files_only=True,
        dtype=data_type,
        device_map=device_map,
        offload_folder=None if source.offload_dir is None else source.offload_dir / source.name,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # refused below, with one line
        output_loading_info=True,
    )
    network, found = loaded
    for key, stored, expected in sorted(found["mismatched_keys"]):
        raise ModelFailed(f"tensor {key!r} has shape {list(stored)}: expected {list(expected)}")
    if missing := sorted(found["missing_keys"]):  # transformers initialises them at random
        others = sorted(found["unexpected_keys"])
        raise ModelFailed(
            f"the checkpoint has no weights for {shortlist(missing)}"
            + (f"; it has unknown weights: {shortlist(others)}" if others else "")
        )
    unused = _unused(network, found["unexpected_keys"])
    if unused := [name for name in unused if not _adds_nothing(checkpoint, name)]:
        raise ModelFailed(
            f"the checkpoint has weights that config.json does not describe: {shortlist(unused)}; "
            "correct config.json, or merge or remove these weights"
        )
    network.requires_grad_(requires_grad=False)
    frozen: PreTrainedModel = network.eval()
    return frozen


def _unused(network: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """Filter the stored weights that the model does not use and that could change its output.

    transformers has already removed those that the model class declares as ignorable. This removes
    layers beyond the configuration's last one (truncated models), heads that predict further
    tokens, and position ids, masks and frequencies that the model computes itself.
    """
    n_layers: int = network.config.get_text_config().num_hidden_layers
    lists = {
        name.rpartition(".")[2]
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    numbered = re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, lists))})\.(\d+)\.")
    computed = {name for name, _ in network.named_buffers()}

    def ignorable(key: str) -> bool:
        layer = numbered.search(key) if lists else None
        beyond = layer is not None and int(layer[1]) >= n_layers
        return beyond or key in computed or NOT_IN_OUTPUT.search(key) is not None

    return sorted(key for key in keys if not ignorable(key))


def _adds_nothing(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a weight is a bias of zeros, which AutoGPTQ wrote for maps that have no bias."""
    stored = (checkpoint.dense or {}).get(name)
    return stored is not None and name.endswith(".bias") and not bool(stored.read().any())


def _skeleton(checkpoint: Checkpoint, data_type: torch.dtype) -> Any:
    """Build the model on the meta device, after checking that the weights fit it."""
    with torch.device("meta"), limited_construction(len(checkpoint.stored)):
        skeleton: Any = AutoModelForCausalLM.from_config(checkpoint.config, dtype=data_type)
    check_sizes(skeleton, checkpoint.stored)
    return skeleton


def _device_map(source: ModelSource, skeleton: Any) -> DeviceMap:
    """Choose devices for the weights before reading them.

    Raises `ModelFailed` if they fit nowhere.
    """
    need = memory_needed(skeleton, source.chunk_bytes, source.row_cache_bytes)
    device_map = place(skeleton, need, source.device, source.limits, source.offload_dir)
    devices = list(dict.fromkeys(str(device) for device in device_map.values()))
    computing = next((device for device in devices if device not in {"cpu", DISK}), "cpu")
    need = need.on(computing)
    logger.info("model %s needs about %s on %s", source.name, need, ", ".join(devices))
    return device_map


def _data_type(source: ModelSource, checkpoint: Checkpoint) -> torch.dtype:
    """Data type of the weights. `auto` is the checkpoint's, but float32 on a CPU."""
    if source.data_type != "auto":
        return DATA_TYPES[source.data_type]
    on_cpu = source.device == "cpu" or (source.device == AUTO and not torch.cuda.is_available())
    own = str(checkpoint.config.dtype).removeprefix("torch.")
    return torch.float32 if on_cpu else DATA_TYPES.get(own, torch.float32)


def _provenance(
    source: ModelSource,
    checkpoint: Checkpoint,
    network: PreTrainedModel,
    progress: LoadingProgress,
) -> Provenance:
    folder, names = checkpoint.folder, checkpoint.weight_files
    revision = checkpoint.commit or weights_hash(folder, names, progress.advance)
    progress.finish_pass()
    inside = f" in {checkpoint.wrapper}" if checkpoint.wrapper else ""
    return Provenance(
        model=source.name,
        revision=revision,
        architecture=type(network).__name__ + inside,
        data_type=str(network.dtype).removeprefix("torch."),
        device=devices_of(network),
        quantization=checkpoint.quantization,
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
    except PackageNotFoundError:  # the package is not installed
        return "unknown"


def weights_hash(
    folder: Path, names: Iterable[str], advance: Callable[[float], object] = lambda _: None
) -> str:
    """Compute the SHA-256 of the SHA-256 digests of the named files, in order of their names.

    `advance` receives the share of the bytes that are hashed.
    """
    files = [folder / name for name in sorted(names)]
    total, hashed = sum(file.stat().st_size for file in files), 0
    digest, block = hashlib.sha256(), bytearray(HASHED_BYTES)
    for path in files:
        of_file = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                of_file.update(memoryview(block)[:count])
                hashed += count
                advance(hashed / total)
        digest.update(of_file.digest())
    return digest.hexdigest()

"""Reading a model from a local folder or the hub: safetensors only, no remote code."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import logging as transformers_logging

from januslens_server.errors import ModelFailed
from januslens_server.lens.head import CHUNK_BYTES
from januslens_server.models.adapters import view_of
from januslens_server.models.checkpoint import Checkpoint, first_line, open_checkpoint
from januslens_server.models.finite import check_weights
from januslens_server.models.memory import needed
from januslens_server.models.offload import brought
from januslens_server.models.placement import AUTO, DISK, DeviceMap, devices_of, place
from januslens_server.models.resident import ROW_CACHE_BYTES, ResidentModel
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.models.tokens import Vocabulary
from januslens_server.models.vetting import check_sizes, limited_construction, read_json
from januslens_server.results import Provenance

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
        with brought(network):
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
    need = needed(skeleton, source.chunk_bytes, source.row_cache_bytes)
    device_map = place(skeleton, need, source.device, source.limits, source.offload_dir)
    devices = list(dict.fromkeys(str(device) for device in device_map.values()))
    computing = next((device for device in devices if device not in {"cpu", DISK}), "cpu")
    need = need.on(computing)
    logger.info("model %s takes about %s on %s", source.name, need, ", ".join(devices))
    return device_map


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the folder, splitting texts as its `tokenizer.json` says.

    transformers rebuilds the normaliser and pre-tokenizer of many tokenizer classes from the class
    alone, so the file is read by the `tokenizers` library itself. Only added tokens that
    `tokenizer_config.json` or `added_tokens.json` list beside the file's are added to it.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if not isinstance(made, PreTrainedTokenizerFast):
            raise ModelFailed("expected a fast tokenizer (tokenizer.json), got none")
        return Vocabulary(made.backend_tokenizer, made.all_special_tokens)
    tokenizer = Tokenizer.from_file(str(file))
    described = {
        name: read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    }
    config, named, added = described.values()
    control = [*_named_tokens(named), *_named_tokens(config)]
    listed = {
        int(token_id): AddedToken(**token)
        for token_id, token in config.get("added_tokens_decoder", {}).items()
    } or {
        token_id: AddedToken(text, special=text in control, normalized=text not in control)
        for text, token_id in added.items()
    }
    _add_listed_tokens(tokenizer, listed)
    return Vocabulary(tokenizer, control)


def _named_tokens(described: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that a description names, as `bos_token` or in a list of further ones."""
    for key, value in described.items():
        if key.endswith("_token"):
            tokens = [value]
        elif key in {"additional_special_tokens", "extra_special_tokens"}:
            tokens = list(value.values() if isinstance(value, dict) else value or ())
        else:
            tokens = []
        for token in tokens:
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):  # keys such as add_bos_token hold no text
                yield text


def _add_listed_tokens(tokenizer: Tokenizer, listed: Mapping[int, AddedToken]) -> None:
    """Add the tokens that the file lacks, in the order of their ids."""
    for token_id, token in sorted(listed.items()):
        known = tokenizer.token_to_id(token.content)
        if known is None:
            tokenizer.add_tokens([token])
            known = tokenizer.token_to_id(token.content)
        if known != token_id:
            raise ModelFailed(
                f"tokenizer_config.json gives token {token.content!r} the id {token_id}, "
                f"tokenizer.json gives it {known}; make the two files agree"
            )


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

"""Reading a model from a local folder or the hub: safetensors only, no remote code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import logging as transformers_logging

from januslens_server.errors import ModelFailed
from januslens_server.models.adapters import view_of
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tokens import Vocabulary
from januslens_server.results import Provenance

# A server's log is no terminal.
transformers_logging.disable_progress_bar()

DATA_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelSource:
    """What to load: a local folder or hub id, its `revision` on the hub, and how."""

    name: str
    location: str
    revision: str | None = None
    device: str = "cpu"
    data_type: str = "auto"

    @property
    def folder(self) -> Path | None:
        """The local folder, if `location` is one."""
        path = Path(self.location).expanduser()
        return path if path.is_dir() else None


def load(source: ModelSource) -> ResidentModel:
    """Load weights, tokenizer and adapter.

    Raises `ModelFailed` with what was found where the model is missing, broken, not in
    safetensors, or of an architecture without an adapter.
    """
    try:
        network = _network(source)
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelFailed(f"{source.location}: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelFailed(
            f"{source.location}: expected a fast tokenizer (tokenizer.json), got none"
        )
    return ResidentModel(
        name=source.name,
        network=network,
        view=view_of(network),
        vocabulary=Vocabulary(tokenizer),
        provenance=_provenance(source, network),
    )


def _network(source: ModelSource) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(
        source.location, revision=source.revision, trust_remote_code=False
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.location,
        config=config,
        revision=source.revision,
        dtype=_data_type(source),
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    network, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers has drawn them at random
        raise ModelFailed(
            f"{source.location}: expected every weight, got none for {len(missing)} parameters: "
            + ", ".join(missing[:3])
        )
    network.requires_grad_(requires_grad=False)
    frozen: PreTrainedModel = network.eval().to(source.device)
    return frozen


def _data_type(source: ModelSource) -> torch.dtype | str:
    """`auto` is the checkpoint's own type, but float32 on a CPU, where half is slow and coarse."""
    if source.data_type == "auto":
        return torch.float32 if source.device == "cpu" else "auto"
    return DATA_TYPES[source.data_type]


def _provenance(source: ModelSource, network: PreTrainedModel) -> Provenance:
    folder = source.folder
    revision = getattr(network.config, "_commit_hash", None) or source.revision or ""
    return Provenance(
        model=source.name,
        revision=revision if folder is None else weights_hash(folder),
        architecture=type(network).__name__,
        data_type=str(network.dtype).removeprefix("torch."),
        device=str(network.device),
        attention=str(network.config._attn_implementation),  # noqa: SLF001 - no public reader
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


def weights_hash(folder: Path) -> str:
    """SHA-256 over the folder's safetensors files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__

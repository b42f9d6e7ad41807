"""Check a model folder before any library acts on its contents.

A model folder is untrusted data. Its files can name code, repositories and paths for transformers
to load, and sizes for it to allocate. `check_folder` refuses both, and files that cannot be read
safely. `check_header`, `limited_construction` and `check_sizes` compare the configuration with the
weights in the folder. All checks raise `ModelFailed` with a message of one line.
"""

from __future__ import annotations

import json
import logging
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch import nn
from torch.nn.modules import module as registration
from transformers import PreTrainedConfig

from januslens_server.errors import ModelFailed, readable_size
from januslens_server.results import ModelFacts

KIB, MIB = 2**10, 2**20

CONFIGURATION = "config.json"
# Maximum bytes of files that are parsed as a whole. Published configurations have about 10 KiB,
# the largest tokenizers 35 MiB, indices of thousands of shards a few MiB.
CONFIGURATION_BYTES = 4 * MIB
DESCRIPTION_BYTES = 64 * MIB
# Maximum entries in such a file. Each takes up to 500 bytes of memory once it is parsed. The index
# of 200,000 tensors has as many entries, the largest published tokenizer.json 1.3 million.
MAX_ENTRIES, MAX_VOCABULARY_ENTRIES = 1_000_000, 3_000_000
# Maximum bytes of a weights file's header; 100,000 tensors take about 12 MiB.
HEADER_BYTES = 32 * MIB
MAX_TENSORS = 200_000

# Suffixes of files that transformers or tokenizers parse.
DESCRIPTIONS = frozenset(
    {".bpe", ".codes", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".tokenizer", ".txt"}
)
CONFIGURATIONS = (CONFIGURATION, "generation_config.json", "tokenizer_config.json")
# These have at most `CONFIGURATION_BYTES`, all other files with these suffixes `DESCRIPTION_BYTES`.
SMALL_FILES = frozenset(
    {
        *CONFIGURATIONS,
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
    }
)

# Implementations of attention and experts that use torch only. Other values name packages or
# repositories with kernels, which transformers would import or download.
TORCH_ATTENTION = frozenset({"eager", "sdpa"})
# Saved with models that were trained with these packages. Torch computes the same attention.
REPLACED_ATTENTION = frozenset({"flash_attention_2", "flash_attention_3", "flex_attention"})
ALLOWED_IMPLEMENTATIONS = {
    "attn_implementation": TORCH_ATTENTION | REPLACED_ATTENTION,
    "_attn_implementation": TORCH_ATTENTION | REPLACED_ATTENTION,
    "_attn_implementation_internal": TORCH_ATTENTION | REPLACED_ATTENTION,
    "experts_implementation": frozenset({"eager", "batched_mm", "grouped_mm"}),
    "_experts_implementation": frozenset({"eager", "batched_mm", "grouped_mm"}),
    "_experts_implementation_internal": frozenset({"eager", "batched_mm", "grouped_mm"}),
}

# Keys that, at any depth, make transformers load other files, repositories or code.
REFUSED_KEYS = {
    "backbone": "another model's configuration",
    "compression_config": "quantised weights of a part of the model",
    "quantization_config": "quantised weights of a part of the model",
    "configuration_files": "another configuration file",
    "custom_generate": "code for generation",
    "distributed_config": "a distributed model",
    "fast_tokenizer_files": "another tokenizer file",
    "fusion_config": "replaced modules",
    "init_inputs": "arguments for a tokenizer class",
    "kernel_config": "kernels from the hub",
    "tp_plan": "a distributed model",
    "transformers_weights": "another weights file",
    "use_kernels": "kernels from the hub",
    "use_pretrained_backbone": "another model's weights",
}

# Keys of config.json that describe quantised weights; `quantized` reads or refuses their values.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")

# Files that make transformers load more than the weights.
ADAPTER = "adapter_config.json"
DISTRIBUTED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")

# Counts from which configurations and models build lists: of layers, experts, labels. The largest
# in a default configuration of transformers is 16,384 experts (Doge, also where it has none).
COUNT = re.compile(r"(layers?|experts?|labels?|attention_types)$")
MAX_COUNT = 16_384

# Fractions of a head that rotary embeddings rotate. Larger ones allocate tables of any width.
FRACTIONS = frozenset({"partial_rotary_factor", "rope_pct", "rotary_emb_fraction", "rotary_pct"})

# A tensor on disk may become several parameters, each in one or two modules.
PER_TENSOR, FIXED = 8, 1000
CONSTRUCTION_SECONDS = 120.0
# Maximum ratio of described to stored parameters; below it, missing ones are found by name later.
MAX_EXCESS = 2
# Values in tables that a model computes from its configuration: masks and rotations by position.
MAX_COMPUTED = 64 * MIB

# Longest context that the contract's fields and 32-bit positions can hold.
MAX_POSITIONS = 2**31 - 1

# Longest text of an error that quotes a folder, in characters.
MAX_REASON = 1000

# A quoted name in the text of an error.
QUOTED = re.compile(r"'([\w.]+)'")

logger = logging.getLogger(__name__)

_operator_offline = constants.HF_HUB_OFFLINE
# Libraries must not use the network. `online` permits it for a model that the operator configured.
constants.HF_HUB_OFFLINE = True


@contextmanager
def online() -> Iterator[None]:
    """Allow requests to the hub, unless the operator's environment forbids them."""
    constants.HF_HUB_OFFLINE = _operator_offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = True


def check_folder(folder: Path) -> None:
    """Refuse special files, links out of the folder, oversized files, and keys that select code."""
    root = _root(folder)
    for entry in sorted(folder.iterdir()):
        _check_entry(entry, root)
    if (folder / ADAPTER).exists() and (folder / CONFIGURATION).exists():
        logger.warning(
            "ignoring %s: the folder also has the whole weights, which are served", folder / ADAPTER
        )
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            described = read_json(folder / name)
            check_keys(name, _not_quantised(described) if name == CONFIGURATION else described)


def _not_quantised(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration without the scheme of its weights, or of its text model's."""
    kept = {key: value for key, value in described.items() if key not in QUANTIZATION_KEYS}
    if isinstance(text := kept.get("text_config"), Mapping):
        kept["text_config"] = {k: v for k, v in text.items() if k not in QUANTIZATION_KEYS}
    return kept


def _root(folder: Path) -> Path:
    """The folder that links must not leave: the model's, or its repository's in the hub's cache."""
    resolved = folder.resolve()
    repository = resolved.parent.parent
    cached = resolved.parent.name == "snapshots" and (repository / "blobs").is_dir()
    return repository if cached else resolved


def _check_entry(entry: Path, root: Path) -> None:
    target = entry.resolve()
    if not target.is_relative_to(root):
        raise ModelFailed(
            f"{entry.name!r} links to {target}, outside the folder; copy the file into the folder"
        )
    try:
        status = target.stat()
    except FileNotFoundError:  # a dangling link counts as a missing file
        return
    if DISTRIBUTED.fullmatch(entry.name):
        raise ModelFailed(
            f"{entry.name!r} belongs to a distributed checkpoint: expected whole tensors"
        )
    if stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise ModelFailed(f"{entry.name!r} is not a regular file")
    limit = CONFIGURATION_BYTES if entry.name in SMALL_FILES else DESCRIPTION_BYTES
    if entry.suffix in DESCRIPTIONS and status.st_size > limit:
        raise ModelFailed(
            f"{entry.name!r} is too large: expected at most {readable_size(limit)}, "
            f"got {readable_size(status.st_size)}"
        )


def read_json(path: Path) -> Mapping[str, Any]:
    """Read the JSON object in a file that passed `check_folder`."""
    check_entries(path, MAX_ENTRIES)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ModelFailed(f"{path.name} is not a valid JSON file: {reason}") from error
    if not isinstance(found, dict):
        raise ModelFailed(f"{path.name} holds a {type(found).__name__}: expected an object")
    return found


def check_entries(path: Path, limit: int) -> None:
    """Refuse a file with too many entries, before it is parsed.

    An entry of a JSON file begins after a comma or a bracket, an entry of another file on its own
    line.
    """
    content = path.read_bytes()
    marks = (b",", b"[", b"{") if path.suffix == ".json" else (b"\n",)
    found = sum(map(content.count, marks))
    if found > limit:
        raise ModelFailed(
            f"{path.name} has too many entries: expected at most {limit}, got {found}"
        )


def check_keys(name: str, described: object, counted: str = "") -> None:
    """Refuse keys that select code and counts that are too large, at any depth of a file.

    `name` is the file's name, `described` its content, and `counted` the key of a list of counts.
    """
    if isinstance(described, Mapping):
        for key, value in described.items():
            _check_key(name, key, value)
            check_keys(name, value, key if COUNT.search(key) else "")
    elif isinstance(described, list):
        for value in described:
            check_keys(name, value, counted)
    elif isinstance(described, int) and counted and described > MAX_COUNT:
        raise ModelFailed(
            f"{name}: {counted} is too large: expected at most {MAX_COUNT}, got {described}"
        )


def _check_key(name: str, key: str, value: object) -> None:
    if not value:
        return
    if key in REFUSED_KEYS:
        raise ModelFailed(
            f"{name}: {key} selects {REFUSED_KEYS[key]}, which is not supported; remove the key"
        )
    if key in FRACTIONS and isinstance(value, int | float) and not 0 < value <= 1:
        raise ModelFailed(f"{name}: invalid {key} {value}: expected a number above 0, at most 1")
    if key in ALLOWED_IMPLEMENTATIONS:
        allowed = ALLOWED_IMPLEMENTATIONS[key]
        chosen = value.values() if isinstance(value, Mapping) else [value]
        if refused := [c for c in chosen if c and (not isinstance(c, str) or c not in allowed)]:
            served = " or ".join(sorted(allowed - REPLACED_ATTENTION))
            raise ModelFailed(f"{name}: invalid {key} {refused[0]!r}: expected {served}; remove it")


def _text_of(error: Exception) -> str:
    """Return an error's text; describe Python's failed look-ups in words."""
    if isinstance(error, AttributeError):
        quoted = QUOTED.findall(str(error))
        name = error.name or (quoted[0] if quoted else "field")
        return f"found no usable {name} in {CONFIGURATION} or in a module"
    if isinstance(error, KeyError):
        return f"found no entry {error.args[0]!r}" if error.args else "found no entry"
    if isinstance(error, IndexError | TypeError | NotImplementedError | AssertionError):
        return "got a value of an unexpected type or length"
    return str(error)


def one_line(error: Exception) -> str:
    """Return an error's text as one printable line of at most `MAX_REASON` characters.

    Errors quote names from the folder, which may hold line ends and lone surrogates or be of any
    length. Advice on further lines is left out, unless the first one only announces it. A failed
    look-up in transformers' code becomes the name that was looked up.
    """
    lines = _text_of(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    short = text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


def compute_attention_with_torch(config: PreTrainedConfig) -> None:
    """Let transformers choose the attention if a configuration names that of another package."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        chosen = getattr(part, "_attn_implementation", None)
        if part is not None and chosen not in TORCH_ATTENTION | {None}:
            part._attn_implementation = None  # noqa: SLF001 - no public writer


def check_file_names(names: Sequence[object], index: str) -> list[str]:
    """Return the sorted weights files of an index; refuse any but safetensors in the folder."""
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelFailed(f"{index} lists {name!r}: expected names of files in the folder")
        if not name.endswith(".safetensors"):
            raise ModelFailed(f"{index} lists {name!r}: expected safetensors files")
    return sorted({str(name) for name in names})


def check_header(path: Path) -> None:
    """Refuse a weights file with a header that is too large, before it is parsed."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > HEADER_BYTES:
        raise ModelFailed(
            f"{path.name!r} is not a valid safetensors file: it has {path.stat().st_size} bytes, "
            f"but a header of {size} bytes"
        )


@contextmanager
def limited_construction(n_tensors: int) -> Iterator[None]:
    """Stop building a model with far more modules and parameters than the weights have tensors."""
    if n_tensors > MAX_TENSORS:
        raise ModelFailed(f"too many tensors: expected at most {MAX_TENSORS}, got {n_tensors}")
    limit, parts = PER_TENSOR * n_tensors + FIXED, 0
    deadline = time.monotonic() + CONSTRUCTION_SECONDS

    def count(_module: nn.Module, _name: str, _part: object) -> None:
        nonlocal parts
        parts += 1
        if parts > limit or time.monotonic() > deadline:
            raise ModelFailed(
                f"the configuration describes a model of more than {parts - 1} modules and "
                f"parameters, but the weights hold only {n_tensors} tensors"
            )

    hooks = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_facts(facts: ModelFacts) -> None:
    """Refuse heads of size zero, and contexts that are empty or too long for a request."""
    if facts.n_heads and facts.d_head < 1:
        raise ModelFailed(
            f"the configuration splits {facts.d_model} dimensions among {facts.n_heads} heads: "
            "expected at least one dimension per head"
        )
    if not 0 < facts.max_positions <= MAX_POSITIONS:
        raise ModelFailed(
            f"the configuration gives a context of {facts.max_positions} positions: expected 1 to "
            f"{MAX_POSITIONS}"
        )


def check_sizes(skeleton: nn.Module, stored: Mapping[str, int]) -> None:
    """Refuse weights that do not fit the configuration, before memory is allocated.

    `skeleton` is the model on the meta device. `stored` holds the number of values of every tensor
    on disk.
    """
    described, held = sum(p.numel() for p in skeleton.parameters()), sum(stored.values())
    if described > MAX_EXCESS * held + MIB:
        raise ModelFailed(
            f"the configuration describes {described} parameters, but the weights hold only {held}"
        )
    computed = sum(buffer.numel() for buffer in skeleton.buffers())
    if computed > MAX_COMPUTED + MAX_EXCESS * held:
        raise ModelFailed(
            f"the configuration describes {computed} values in buffers, but the weights hold only "
            f"{held}"
        )
    name, largest = max(stored.items(), key=lambda entry: entry[1], default=("", 0))
    if largest > described + MIB:
        raise ModelFailed(
            f"the configuration describes {described} parameters, but the tensor {name!r} alone "
            f"holds {largest}"
        )

"""Read the header of a GGUF file, and refuse a file that transformers would read inexactly.

A GGUF file holds metadata, the tensors' names, shapes and types, and their values, mostly
quantised (github.com/ggml-org/ggml, docs/gguf.md). The header is read here, within limits, because
the `gguf` library trusts all sizes in the file. The library dequantises the values. Metadata and
tensors that this module does not know may change the numbers, so a file with them is refused.
transformers' own reader ignores them.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from januslens_server.errors import ModelFailed, shortlist
from januslens_server.models.vetting import MAX_TENSORS, MIB, check_keys

MAGIC, VERSIONS = b"GGUF", (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEYS, MAX_NAME, MAX_TEXT, MAX_DIMENSIONS = 10_000, 1024, MIB, 4
# Values in the divisors of frequencies, half of a head's dimensions.
MAX_FREQUENCIES = 4096
# Bytes of the header, and entries of all of its arrays. Gemma 3's have 6 MiB and 786,000.
MAX_HEADER, MAX_ARRAY_ENTRIES = 128 * MIB, 2_000_000

# The formats of metadata values by type number; 8 is a string and 9 an array.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Architectures whose files are read, and transformers' name of each.
FAMILIES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "llama": "llama",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "smollm3": "smollm3",
    "starcoder2": "starcoder2",
}
# What llama's files describe if they have experts.
MIXTURES = {"llama": "mixtral"}
# Attributes of transformers' configuration by metadata key, without the architecture before it.
# A key that is not listed may change the numbers, so it is refused.
ATTRIBUTES = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.value_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# Further keys of single architectures, and those that stand for another attribute there.
EXPERTS = {
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
}
LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
}
OWN_ATTRIBUTES = {
    "gpt-oss": LOCAL_EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
    "granite": GRANITE,
    "granitemoe": GRANITE | LOCAL_EXPERTS,
    "llama": LOCAL_EXPERTS,
    "olmoe": {key: EXPERTS[key] for key in ("expert_count", "expert_used_count")},
    "qwen2moe": EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    "qwen3moe": EXPERTS,
    "starcoder2": {"attention.layer_norm_epsilon": "norm_epsilon"},
}
# Settings that are real numbers. All others count something, in 32 bits.
REAL = {
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
MAX_SETTING, FLOAT32 = 2**31 - 1, torch.finfo(torch.float32)
# What all checkpoints of an architecture have in common, and no setting says.
COMMON_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "qwen2moe": {"norm_topk_prob": False},
    "qwen3moe": {"norm_topk_prob": True},
}
# Scaling of rotary embeddings: a division of all positions, in Gemma 3 in the layers without a
# window, YaRN's, or none. A factor without a type divides, as in llama.cpp.
SCALING_TYPE, SCALING_FACTOR = "rope.scaling.type", "rope.scaling.factor"
LINEAR, YARN, UNSCALED = "linear", "yarn", "none"
# YaRN's settings and their names in transformers. The first two are required; for the others,
# transformers and llama.cpp use the same values.
YARN_SETTINGS = {
    SCALING_FACTOR: "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Whether YaRN rounds the dimensions between which it blends. gpt-oss does not.
UNROUNDED_YARN = {"gpt-oss"}
# The divisors of Llama 3's frequencies, and the settings that all of its checkpoints share
# (Llama 3.1 to 3.3). The factor is the largest divisor.
FREQUENCIES = "rope_freqs.weight"
LLAMA_3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The stored names of matrices that transformers stores as one parameter for all experts.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Architectures whose experts multiply by the transpose of what is stored, with the rows of the two
# halves of `gate_up_proj` by turns.
INTERLEAVED = {"gpt-oss"}
# Modules of Granite's mixtures by a name that the `gguf` library knows.
RENAMED = {
    ".block_sparse_moe.router": ".block_sparse_moe.router.layer",
    ".block_sparse_moe.experts": ".mlp.experts",
}
# Architectures whose queries and keys are stored with neighbouring rows rotated together.
NEIGHBOURS = {"granite", "granitemoe", "llama", "smollm3"}
# Architectures whose norms are stored with the 1 that the model adds.
NORMS_WITH_ONE = {"gemma", "gemma2", "gemma3"}
REQUIRED = {"block_count", "context_length", "embedding_length", "attention.head_count"}
# Settings for which transformers would use a value of its own. The epsilon of norms is another one.
OWN_REQUIRED = {
    "gemma3": {"attention.sliding_window"},
    "gpt-oss": {"attention.key_length", "attention.sliding_window", "expert_count"},
    "granite": set(GRANITE),
    "granitemoe": set(GRANITE | LOCAL_EXPERTS),
}
LAYER_NORMS = {"gpt2", "starcoder2"}  # all others have RMSNorm
DEFAULT_BASE = 1e4  # of rotary embeddings in files without rope.freq_base, as in llama.cpp
UNEMBEDDING = "output.weight"
TRANSPOSED = re.compile(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$")
# No tool writes safetensors from a GGUF file.
ADVICE = "serve the checkpoint that it was made from: --model NAME=FOLDER with its safetensors"
# Gemma models of these numbers of layers divide scores by another width than a head's, which their
# files do not say.
UNUSUAL_SCALE = {"gemma2": 46, "gemma3": 62}
TOLERANCE = 1e-6


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: `n_bytes` bytes from `start`, of a type such as `Q4_K`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    n_bytes: int

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """The metadata and tensors of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """The architecture's name in the file."""
        return str(self.metadata.get("general.architecture"))

    @property
    def quantization(self) -> str:
        """The types of quantised tensors, such as `GGUF Q4_K, Q6_K`; empty if there are none."""
        kinds = sorted({tensor.kind for tensor in self.tensors.values()} - {"F32", "F16", "BF16"})
        return f"GGUF {', '.join(kinds)}" if kinds else ""


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Raises:
        ModelFailed: The file is not GGUF, is cut, or gives sizes that are too large.
    """
    if not path.exists():
        raise ModelFailed("the file does not exist; expected a GGUF file")
    if not path.is_file():
        raise ModelFailed("not a regular file; expected a GGUF file")
    size = path.stat().st_size
    if size < 24:
        raise ModelFailed(f"the file has {size} bytes; expected a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Reader(path, content).header()


class _Reader:
    """A position in a GGUF file, which moves over its header."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 0
        self._entries = 0

    def header(self) -> GGUFHeader:
        if self._take(4) != MAGIC:
            raise ModelFailed("the file does not begin with GGUF; expected a GGUF file")
        version = self._number("I")
        if version not in VERSIONS:
            raise ModelFailed(f"GGUF version {version} is not read; expected 2 or 3")
        n_tensors = self._count("Q", MAX_TENSORS, "tensors")
        n_keys = self._count("Q", MAX_KEYS, "metadata keys")
        metadata = {}
        for _ in range(n_keys):
            key = self._text(MAX_NAME)
            if key in metadata:
                raise ModelFailed(f"the file has the metadata key {key!r} twice")
            metadata[key] = self._value(self._number("I"))
        listed = [self._tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
            raise ModelFailed(f"invalid general.alignment {alignment!r}; expected 1 to 65536")
        data = -(-self._at // alignment) * alignment
        tensors = {t.name: replace(t, start=data + t.start) for t in listed}
        if len(tensors) != n_tensors:
            raise ModelFailed("the file names a tensor twice")
        self._check_places(tensors.values())
        return GGUFHeader(self._path, metadata, tensors)

    def _check_places(self, tensors: Iterable[StoredTensor]) -> None:
        """Refuse tensors beyond the file's end, and those that share bytes of the file.

        Shared bytes would let a small file describe a model of any size.
        """
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            if tensor.start < end:
                raise ModelFailed(f"tensor {tensor.name!r} overlaps another one in the file")
            end = tensor.start + tensor.n_bytes
        if end > len(self._content):
            raise ModelFailed(f"the file is cut: expected {end} bytes, got {len(self._content)}")

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._content):
            raise ModelFailed(f"the file is cut: its header does not end in {self._at} bytes")
        self._at += count
        if self._at > MAX_HEADER:
            raise ModelFailed(
                f"the file's header is too large; expected at most {MAX_HEADER} bytes"
            )
        return self._content[self._at - count : self._at]

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _count(self, form: str, limit: int, what: str) -> int:
        found: int = self._number(form)
        if found > limit:
            raise ModelFailed(f"the file has {found} {what}; expected at most {limit}")
        return found

    def _text(self, limit: int) -> str:
        length = self._count("Q", limit, "bytes in a text")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFailed("a text in the file's header is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text(MAX_TEXT)
        if kind == ARRAY:
            item = self._number("I")
            count = self._count("Q", MAX_ARRAY_ENTRIES - self._entries, "entries in its arrays")
            self._entries += count
            if item == STRING:
                return [self._text(MAX_TEXT) for _ in range(count)]
            form = self._form(item)
            width = struct.calcsize(f"<{form}")
            return list(struct.unpack(f"<{count}{form}", self._take(count * width)))
        return self._number(self._form(kind))

    def _form(self, kind: int) -> str:
        if kind not in SCALARS:
            raise ModelFailed(f"a metadata value has the unknown type {kind}")
        return SCALARS[kind]

    def _tensor(self) -> StoredTensor:
        """Read one entry of the list of tensors; its start counts from the first tensor's."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415 - optional

        name = self._text(MAX_NAME)
        rank = self._count("I", MAX_DIMENSIONS, "dimensions of a tensor")
        shape = tuple(self._number("Q") for _ in range(rank))
        number, offset = self._number("I"), self._number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ModelFailed(f"tensor {name!r} has the unknown type {number}") from error
        block, width = GGML_QUANT_SIZES[kind]
        values, row = math.prod(shape), shape[0] if shape else 1
        if not values:
            raise ModelFailed(f"tensor {name!r} has no values; expected sizes above 0")
        if row % block:
            raise ModelFailed(f"tensor {name!r} has rows of {row}; expected a multiple of {block}")
        return StoredTensor(name, shape, kind.name, offset, values // block * width)


def read_configuration(header: GGUFHeader) -> PreTrainedConfig:
    """Build transformers' configuration from the metadata.

    Raises:
        ModelFailed: The architecture is not read, or a setting has no counterpart.
    """
    family, (settings, scaling) = header.architecture, _settings(header)
    attributes = ATTRIBUTES | OWN_ATTRIBUTES.get(family, {})
    described: dict[str, Any] = {attributes[key]: value for key, value in settings.items()}
    described |= COMMON_SETTINGS.get(family, {})
    described["tie_word_embeddings"] = UNEMBEDDING not in header.tensors
    if "token_embd.weight" in header.tensors:
        described["vocab_size"] = header.tensors["token_embd.weight"].shape[-1]
    if family == "gpt2":
        described["n_inner"] = described.pop("intermediate_size", None)
    if family in UNUSUAL_SCALE:
        width = described["hidden_size"] // max(1, described["num_attention_heads"])
        described["query_pre_attn_scalar"] = described.get("head_dim", width)
    if family == "starcoder2":
        described["use_bias"] = "blk.0.attn_q.bias" in header.tensors
    if family != "gpt2":
        described.setdefault("rope_theta", DEFAULT_BASE)
    if rotary := _rotary(header, scaling, described):
        described["rope_parameters"] = rotary | {"rope_theta": described.pop("rope_theta")}
        if family == "gemma3":
            local = {"rope_type": "default", "rope_theta": DEFAULT_BASE}
            described["rope_parameters"] = {
                "full_attention": described["rope_parameters"],
                "sliding_attention": local,
            }
    end = _end_id(header, described.get("vocab_size", 0))
    check_keys(header.path.name, described)
    families = FAMILIES | MIXTURES if settings.get("expert_count") else FAMILIES
    config: Any = CONFIG_MAPPING[families[family]](  # type: ignore[call-arg]  # any of its class
        eos_token_id=end, bos_token_id=None, pad_token_id=None, **described
    )
    for key, value in settings.items():
        _check_setting(key, value, attributes[key], config)
    checked: PreTrainedConfig = config
    return checked


def _end_id(header: GGUFHeader, n_tokens: int) -> int | None:
    found = header.metadata.get("tokenizer.ggml.eos_token_id")
    if found is None or (type(found) is int and 0 <= found < n_tokens):
        return found
    raise ModelFailed(f"invalid eos_token_id {found!r:.80}; expected 0 to {n_tokens - 1}")


def _rotary(
    header: GGUFHeader, scaling: Mapping[str, Any], described: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters of scaled rotary embeddings without their base; empty if unscaled."""
    kind = scaling.get(SCALING_TYPE, LINEAR if SCALING_FACTOR in scaling else UNSCALED)
    if FREQUENCIES in header.tensors:
        if kind != UNSCALED:
            raise ModelFailed(f"the file scales its rotary embeddings twice; {ADVICE}")
        whole = described["hidden_size"] // max(1, described["num_attention_heads"])
        return _llama_3(header, described.get("head_dim", whole))
    if kind == UNSCALED:
        return {}
    read = YARN_SETTINGS if kind == YARN else {SCALING_FACTOR: "factor"}
    required = list(read)[:2]
    if kind not in _scalings(header.architecture) or scaling.keys() - {SCALING_TYPE, *read}:
        raise ModelFailed(
            f"the file has rope.scaling {kind!r:.80} with {shortlist(sorted(scaling))}; expected "
            f"{' or '.join(map(repr, _scalings(header.architecture)))} without further settings, "
            f"or {UNSCALED!r}; {ADVICE}"
        )
    if missing := sorted(set(required) - scaling.keys()):
        raise ModelFailed(f"the file lacks the settings {shortlist(missing)} of its rope.scaling")
    found = {name: _setting(key, scaling[key]) for key, name in read.items() if key in scaling}
    if kind == YARN and header.architecture in UNROUNDED_YARN:
        found["truncate"] = False
    return {"rope_type": kind} | found


def _scalings(family: str) -> tuple[str, ...]:
    """Return the scalings of rotary embeddings that are read."""
    return (LINEAR,) if family == "gemma3" else (LINEAR, YARN)


def _llama_3(header: GGUFHeader, d_head: float) -> dict[str, Any]:
    """Return Llama 3's rotary parameters; refuse a file with other divisors of frequencies.

    With the wavelength w of a frequency, the factor f and the original context c, the divisor is
    1 for w < c / 4, f for w > c, and between them 1 / ((1 - t) / f + t) with t = (c / w - 1) / 3
    (Llama 3.1's `apply_scaling`; the converters of llama.cpp store the divisors).
    """
    tensor = header.tensors[FREQUENCIES]
    if header.architecture != "llama" or tensor.kind != "F32" or len(tensor.shape) != 1:
        raise ModelFailed(f"the file has tensors that are not read: {FREQUENCIES}; {ADVICE}")
    if 2 * tensor.size != d_head or tensor.size > MAX_FREQUENCIES:
        raise ModelFailed(
            f"the file has {tensor.size} values in {FREQUENCIES} for heads of {d_head:g} "
            f"dimensions; expected half as many, at most {MAX_FREQUENCIES}"
        )
    content = np.memmap(header.path, np.uint8, "r")
    stored = content[tensor.start : tensor.start + tensor.n_bytes].view("<f4").astype(np.float64)
    base = float(header.metadata.get("llama.rope.freq_base", DEFAULT_BASE))
    steps = np.arange(len(stored)) / len(stored)
    wavelengths = 2 * math.pi * base**steps
    factor, context = float(stored.max()), LLAMA_3["original_max_position_embeddings"]
    low, high = LLAMA_3["low_freq_factor"], LLAMA_3["high_freq_factor"]
    between = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - between) / factor + between), rtol=1e-5, atol=0):
        raise ModelFailed(
            f"the file has {FREQUENCIES} with other divisors than those of Llama 3; {ADVICE}"
        )
    return {**LLAMA_3, "factor": factor}


def _settings(header: GGUFHeader) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the settings of the architecture, all of which are known, and those of scaling."""
    family = header.architecture
    if family not in FAMILIES:
        raise ModelFailed(
            f"GGUF files of architecture {family!r:.80} are not read; expected one of "
            f"{', '.join(sorted(FAMILIES))}; {ADVICE}"
        )
    settings = {
        key.removeprefix(f"{family}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{family}.")
    }
    found = {SCALING_TYPE, *YARN_SETTINGS} & settings.keys()
    scaling = {key: settings.pop(key) for key in found}
    if unknown := sorted(
        settings.keys() - ATTRIBUTES.keys() - OWN_ATTRIBUTES.get(family, {}).keys()
    ):
        raise ModelFailed(
            f"the file has settings that are not read: {shortlist(unknown)}; {ADVICE}"
        )
    norm = "layer_norm" if family in LAYER_NORMS else "layer_norm_rms"
    required = REQUIRED | OWN_REQUIRED.get(family, set()) | {f"attention.{norm}_epsilon"}
    if "expert_count" in settings:
        required.add("expert_used_count")
    if missing := sorted(required - settings.keys()):
        raise ModelFailed(f"the file lacks the settings {shortlist(missing)}")
    settings = {key: _setting(key, value) for key, value in settings.items()}
    if UNUSUAL_SCALE.get(family) == settings["block_count"]:
        raise ModelFailed(
            f"{family} of this size scales its attention as no setting says; {ADVICE}"
        )
    return settings, scaling


def _setting(key: str, value: object) -> float:
    """Return a setting: a number above 0, and a whole one unless its key is in `REAL`."""
    expected = f"a whole number from 1 to {MAX_SETTING}"
    if key in REAL:
        expected = f"a number from {FLOAT32.tiny:.2g} to {FLOAT32.max:.2g}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key in REAL and FLOAT32.tiny <= value <= FLOAT32.max:
            return float(value)
        if key not in REAL and isinstance(value, int) and 0 < value <= MAX_SETTING:
            return value
    raise ModelFailed(f"invalid setting {key} {value!r:.80}; expected {expected}")


def _check_setting(key: str, value: float, attribute: str, config: Any) -> None:
    """Refuse a setting that transformers does not apply."""
    fields = type(config).__dataclass_fields__
    if attribute == "rope_theta":
        rotary = getattr(config, "rope_parameters", None) or {}
        found = rotary.get("full_attention", rotary).get("rope_theta")
    elif attribute == "head_dim":
        width = config.hidden_size // config.num_attention_heads
        # GPT-2 reads no head_dim; others do even if their configuration does not declare it.
        found = width if config.model_type == "gpt2" else getattr(config, "head_dim", None) or width
    elif attribute == "intermediate_size" and config.model_type == "gpt2":
        found = config.n_inner
    elif {attribute, config.attribute_map.get(attribute)} & fields.keys():
        found = getattr(config, attribute)
    else:
        found = None  # the configuration keeps any attribute, but its model does not read this one
    if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=TOLERANCE):
        raise ModelFailed(
            f"the file has {key} {value!r}, but transformers uses {attribute} {found!r}; {ADVICE}"
        )


def read_weights(
    header: GGUFHeader, skeleton: nn.Module, n_layers: int, data_type: torch.dtype
) -> dict[str, torch.Tensor]:
    """Read all tensors, dequantised to float32 and then converted to `data_type`.

    `skeleton` is the model on the meta device; its parameters get their names in the file from the
    `gguf` library.

    Raises:
        ModelFailed: The file has tensors that are no parameters of the model, or of another size.
    """
    import gguf  # noqa: PLC0415 - optional

    family = header.architecture
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(kind, n_layers)
    described = skeleton.state_dict()
    sources = {parameter: _sources(parameter, names) for parameter in described}
    parameters = {name: parameter for parameter, found in sources.items() for name in found}
    tensors = {name: t for name, t in header.tensors.items() if name != FREQUENCIES}
    if unused := sorted(tensors.keys() - parameters.keys()):
        raise ModelFailed(f"the file has tensors that are not read: {shortlist(unused)}; {ADVICE}")
    for tensor in tensors.values():
        expected = described[parameters[tensor.name]]
        if tensor.size * len(sources[parameters[tensor.name]]) != expected.numel():
            raise ModelFailed(
                f"tensor {tensor.name!r} has shape {list(tensor.shape[::-1])}: expected "
                f"{list(expected.shape)}"
            )
    content = np.memmap(header.path, np.uint8, "r")
    read: dict[str, torch.Tensor] = {}
    for tensor in tensors.values():
        stored_bytes = content[tensor.start : tensor.start + tensor.n_bytes]
        rows = stored_bytes.reshape(-1, tensor.n_bytes // max(1, math.prod(tensor.shape[1:])))
        type_number = gguf.GGMLQuantizationType[tensor.kind]
        try:
            found = gguf.dequantize(rows, type_number)
        except NotImplementedError as error:
            raise ModelFailed(f"tensors of type {tensor.kind} are not read; {ADVICE}") from error
        # The first size in the file is that of the last dimension.
        shape, expected = tensor.shape[::-1], tuple(described[parameters[tensor.name]].shape)
        if expected == (1, *shape):  # conversions store a matrix of one row as a vector
            shape = expected
        values = torch.from_numpy(np.array(found, np.float32)).reshape(shape)
        read[tensor.name] = _restored(family, tensor.name, values, header).to(data_type)
    return {
        parameter: _joined(family, parameter, [read.pop(name) for name in found])
        for parameter, found in sources.items()
        if found and all(name in read for name in found)
    }


def _sources(parameter: str, names: Any) -> list[str]:
    """Return the stored tensors of a parameter; several for a stack of experts' matrices."""
    stem, _, suffix = parameter.rpartition(".")
    for module, known in RENAMED.items():
        stem = stem.replace(module, known)
    if stem.endswith(".experts"):
        matrix = suffix.removesuffix("_bias")
        kind = "weight" if matrix == suffix else "bias"
        return [f"{names.get_name(f'{stem}.{part}')}.{kind}" for part in STACKED.get(matrix, ())]
    if stored := names.get_name(stem):
        return [f"{stored}.{suffix}"]
    stored = names.get_name(parameter)  # a vector such as the sinks of attention
    return [] if stored is None else [f"{stored}.weight"]


def _joined(family: str, parameter: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a parameter from its stored tensors `[experts, rows, ...]`, if there are several."""
    if family not in INTERLEAVED or ".experts." not in parameter:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
    rows = torch.stack(list(parts), 2).flatten(1, 2)
    return rows.transpose(1, 2).contiguous() if rows.ndim == 3 else rows


def _restored(family: str, name: str, values: torch.Tensor, header: GGUFHeader) -> torch.Tensor:
    """Undo what the conversion to GGUF did to a tensor.

    Queries and keys of `NEIGHBOURS` are stored with neighbouring rows rotated together instead of
    halves, GPT-2's maps transposed, and Gemma's norms with the 1 that the model adds.
    """
    if family in NEIGHBOURS and (".attn_q." in name or ".attn_k." in name):
        n_heads = header.metadata[f"{family}.attention.head_count"]
        if ".attn_k." in name:
            n_heads = header.metadata.get(f"{family}.attention.head_count_kv", n_heads)
        pairs = values.reshape(n_heads, -1, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape).contiguous()
    if family == "gpt2" and TRANSPOSED.search(name):
        return values.T.contiguous()
    if family in NORMS_WITH_ONE and name.endswith("norm.weight"):
        return values - 1
    return values

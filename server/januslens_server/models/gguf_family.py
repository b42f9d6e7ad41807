"""How the files of one architecture stand for a model of transformers.

llama.cpp's converters (its folder `conversion`) write the settings that llama.cpp reads, and
rename, reorder, split and shift weights. A `Family` states how to undo it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from januslens_server.errors import ModelFailed
from januslens_server.models.gguf_file import ADVICE, GGUFHeader

# Attributes of transformers' configuration by metadata key, without the architecture before it.
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
REQUIRED = {"block_count", "context_length", "embedding_length", "attention.head_count"}
EPSILON = "attention.layer_norm_rms_epsilon"

# The base of rotary embeddings in files without rope.freq_base, as in llama.cpp.
DEFAULT_BASE = 1e4
# The key of the base in layers with a window.
LOCAL_BASE = "rope.freq_base_swa"
# Scalings of rotary embeddings: a division of all positions, and YaRN's.
LINEAR, YARN = "linear", "yarn"
# What frequencies are divided by. Values in it, half of a head's dimensions.
FREQUENCIES, MAX_FREQUENCIES = "rope_freqs.weight", 4096
# How much YaRN scales attention, and how much queries are scaled by their position.
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
TEMPERATURE = "attention.temperature_scale"
# The number of layers behind the model's that predict further tokens; they are not read.
FURTHER = "nextn_predict_layers"
# A divisor of what is not rotated.
NOT_ROTATED = 1e29

UNEMBEDDING = "output.weight"
MAX_SETTING, FLOAT32 = 2**31 - 1, torch.finfo(torch.float32)
# The sections of a rotation by time, height and width, and the layers that images enter.
SECTIONS, IMAGES = "rope.dimension_sections", "n_deepstack_layers"
EXPERTS = {
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
}
SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}

# The stored names of matrices that transformers stores as one parameter for all experts.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# Settings by their keys, without the architecture before them.
Settings = Mapping[str, Any]


def joined(parameter: str, parts: Sequence[torch.Tensor], _config: Any) -> torch.Tensor:
    """Return the only part, or the rows of a stack of matrices: the gates' before the others."""
    if len(parts) > 1 and len({part.shape for part in parts}) > 1:
        shapes = [list(part.shape) for part in parts]
        raise ModelFailed(f"the parts of {parameter!r} have shapes {shapes}: expected equal ones")
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


@dataclass(frozen=True)
class Family:
    """How the files of an architecture stand for a model of transformers.

    Attributes:
        model_type: The model's name in transformers.
        attributes: Attributes of its configuration by metadata key, in addition to `ATTRIBUTES` or
            instead of them. They are compared with the configuration that results.
        required: Keys for which transformers would use a value of its own, beyond `REQUIRED`.
        epsilon: The key of the norms' epsilon, which is required as well.
        common: What all checkpoints have in common, and no key says.
        own: Keys whose values `describe` turns into attributes.
        describe: Returns attributes for the header, the values of `own` and the attributes that
            are known. May return `model_type`.
        local_base: Whether layers with a window have a rotation of their own, which is not scaled.
        scalings: The scalings of rotary embeddings that are read.
        yarn: Further parameters of YaRN for the values of `own`.
        tensors: Stored tensors that are settings and not weights.
        modules: Replacements in the names of modules, so that the `gguf` library knows them.
        stored: The last parts of stored names that the library does not know, by those of
            parameters.
        stacks: The stored names of matrices in one parameter of experts, by its name.
        restore: Undoes the conversion: returns a parameter for its name, its stored tensors and the
            configuration.
    """

    model_type: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    epsilon: str = EPSILON
    common: Mapping[str, Any] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    describe: Callable[[GGUFHeader, Settings, Mapping[str, Any]], dict[str, Any]] = (
        lambda _header, _own, _described: {}
    )
    local_base: bool = False
    scalings: tuple[str, ...] = (LINEAR, YARN)
    yarn: Callable[[Settings], dict[str, Any]] = lambda _own: {}
    tensors: frozenset[str] = frozenset()
    modules: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: STACKED)
    restore: Callable[[str, Sequence[torch.Tensor], Any], torch.Tensor] = joined


def number(key: str, value: object, *, least: int = 1) -> int:
    """Return a whole number of 32 bits."""
    if type(value) is int and least <= value <= MAX_SETTING:
        return value
    raise ModelFailed(
        f"invalid setting {key} {value!r:.80}; expected a whole number from {least} to "
        f"{MAX_SETTING}"
    )


def real(key: str, value: object) -> float:
    """Return a number above 0 that float32 has."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
        if FLOAT32.tiny <= found <= FLOAT32.max:
            return found
    raise ModelFailed(
        f"invalid setting {key} {value!r:.80}; expected a number from {FLOAT32.tiny:.2g} to "
        f"{FLOAT32.max:.2g}"
    )


def flag(key: str, value: object) -> bool:
    """Return a setting that is true or false."""
    if isinstance(value, bool):
        return value
    raise ModelFailed(f"invalid setting {key} {value!r:.80}; expected true or false")


def by_layer(key: str, value: object, header: GGUFHeader, read: Callable[..., Any]) -> list[Any]:
    """Return the setting of each layer; a file has one for all of them, or a list."""
    n_layers = header.metadata[f"{header.architecture}.block_count"]
    if number("block_count", n_layers) > len(header.tensors):
        raise ModelFailed(
            f"the file has {len(header.tensors)} tensors for {n_layers} layers; expected more"
        )
    values = value if isinstance(value, list) else [value] * n_layers
    if len(values) != n_layers:
        raise ModelFailed(f"the file has {len(values)} values of {key} for {n_layers} layers")
    return [read(key, item) for item in values]


def frequency_divisors(header: GGUFHeader, d_head: float, name: str = FREQUENCIES) -> np.ndarray:
    """Return what the frequencies of rotary embeddings are divided by, `[d_head / 2]`."""
    tensor = header.tensors[name]
    if tensor.kind != "F32" or len(tensor.shape) != 1:
        raise ModelFailed(
            f"the file has a tensor {name} of type {tensor.kind} {list(tensor.shape)}; expected "
            "one dimension of F32"
        )
    if 2 * tensor.size != d_head or tensor.size > MAX_FREQUENCIES:
        raise ModelFailed(
            f"the file has {tensor.size} values in {name} for heads of {d_head:g} "
            f"dimensions; expected half as many, at most {MAX_FREQUENCIES}"
        )
    return header.stored_bytes(tensor).view("<f4").astype(np.float64)


def stated(own: Settings, key: str) -> tuple[str, Any]:
    """Return a key that `required` has, with its value, for the functions above."""
    return key, own[key]


def check_sigmoid(own: Settings) -> None:
    """Refuse a router whose scores are not sigmoids."""
    if own["expert_gating_func"] != 2:
        raise ModelFailed(
            "the file's router is not the model's: expected expert_gating_func 2 (sigmoid), got "
            f"{own['expert_gating_func']!r:.80}; {ADVICE}"
        )


def halves(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Undo the order of queries and keys in which neighbouring rows are rotated together.

    transformers rotates the rows of the first half of a head with those of the second.
    """
    values = joined(parameter, parts, config)
    for module, n_heads in (
        (".q_proj.", config.num_attention_heads),
        (".k_proj.", config.num_key_value_heads),
    ):
        if module in parameter:
            pairs = values.reshape(n_heads, -1, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape).contiguous()
    return values


def norms_less_one(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Subtract the 1 that Gemma adds to the weights of its norms, and that is stored with them."""
    values = joined(parameter, parts, config)
    return values - 1 if parameter.endswith("norm.weight") else values

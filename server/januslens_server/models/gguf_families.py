"""The architectures of GGUF files that are read, and what their files change or leave out.

llama.cpp's converters (its folder `conversion`) write the settings that llama.cpp reads, and
rename, reorder, split and shift weights. A `Family` states how to undo it. Metadata that no family
mentions may change the numbers, so a file with it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from januslens_server.errors import ModelFailed, shortlist
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
# Scalings of rotary embeddings: a division of all positions, and YaRN's.
LINEAR, YARN = "linear", "yarn"
# What frequencies are divided by. Values in it, half of a head's dimensions.
FREQUENCIES, MAX_FREQUENCIES = "rope_freqs.weight", 4096
# How much YaRN scales attention, and how much queries are scaled by their position.
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
_TEMPERATURE = "attention.temperature_scale"
# The number of layers behind the model's that predict further tokens; they are not read.
FURTHER = "nextn_predict_layers"
# A divisor of what is not rotated.
NOT_ROTATED = 1e29

MAX_SETTING, FLOAT32 = 2**31 - 1, torch.finfo(torch.float32)
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
        scalings: The scalings of rotary embeddings that are read.
        yarn: Further parameters of YaRN for the values of `own`.
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
    scalings: tuple[str, ...] = (LINEAR, YARN)
    yarn: Callable[[Settings], dict[str, Any]] = lambda _own: {}
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


def frequency_divisors(header: GGUFHeader, d_head: float) -> np.ndarray:
    """Return what the frequencies of rotary embeddings are divided by, `[d_head / 2]`."""
    tensor = header.tensors[FREQUENCIES]
    if tensor.kind != "F32" or len(tensor.shape) != 1:
        raise ModelFailed(f"the file has tensors that are not read: {FREQUENCIES}; {ADVICE}")
    if 2 * tensor.size != d_head or tensor.size > MAX_FREQUENCIES:
        raise ModelFailed(
            f"the file has {tensor.size} values in {FREQUENCIES} for heads of {d_head:g} "
            f"dimensions; expected half as many, at most {MAX_FREQUENCIES}"
        )
    return header.stored_bytes(tensor).view("<f4").astype(np.float64)


def _halves(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
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


def _transposed(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Transpose GPT-2's maps, whose parameters have the shape `[d_in, d_out]`."""
    values = joined(parameter, parts, config)
    mapped = parameter.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return values.T.contiguous() if mapped else values


def _norms_less_one(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Subtract the 1 that Gemma adds to the weights of its norms, and that is stored with them."""
    values = joined(parameter, parts, config)
    return values - 1 if parameter.endswith("norm.weight") else values


def _interleaved(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Transpose gpt-oss's experts, with the rows of gate and up by turns."""
    if ".experts." not in parameter:
        return joined(parameter, parts, config)
    joined(parameter, parts, config)  # refuses parts of different shapes
    rows = torch.stack(list(parts), 2).flatten(1, 2)
    return rows.transpose(1, 2).contiguous() if rows.ndim == 3 else rows


def _mixture_of_llama(
    header: GGUFHeader, _own: Settings, _described: Mapping[str, Any]
) -> dict[str, Any]:
    """Llama's files with experts are Mixtral's."""
    return {"model_type": "mixtral"} if "llama.expert_count" in header.metadata else {}


def _starcoder2(
    header: GGUFHeader, _own: Settings, _described: Mapping[str, Any]
) -> dict[str, Any]:
    return {"use_bias": "blk.0.attn_q.bias" in header.tensors}


def _head_scale(header: GGUFHeader, _own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma's attention divides by the root of a head's width, except in the largest models."""
    unusual = {"gemma2": 46, "gemma3": 62}
    if described["num_hidden_layers"] == unusual[header.architecture]:
        raise ModelFailed(
            f"{header.architecture} of this size scales its attention as no setting says; {ADVICE}"
        )
    width = described["hidden_size"] // max(1, described["num_attention_heads"])
    return {"query_pre_attn_scalar": described.get("head_dim", width)}


def _lfm2moe(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """LFM2 with experts, whose router is a sigmoid with normalised scores."""
    _check_sigmoid(own)
    found = _lfm2(header, own, described)
    del found["block_auto_adjust_ff_dim"]
    return found | {
        "num_dense_layers": number(*_stated(own, "leading_dense_block_count"), least=0),
        "use_expert_bias": any(name.endswith(".exp_probs_b.bias") for name in header.tensors),
    }


def _check_sigmoid(own: Settings) -> None:
    if own["expert_gating_func"] != 2:
        raise ModelFailed(
            "the file's router is not the model's: expected expert_gating_func 2 (sigmoid), got "
            f"{own['expert_gating_func']!r:.80}; {ADVICE}"
        )


def _mistral3(_header: GGUFHeader, own: Settings, _described: Mapping[str, Any]) -> dict[str, Any]:
    """Ministral 3 scales queries by their position; Mistral Small is like Llama."""
    return {"model_type": "ministral3"} if _TEMPERATURE in own else {}


def _mistral3_yarn(own: Settings) -> dict[str, Any]:
    """Return what Ministral 3 adds to YaRN; its mscale is 1, as llama.cpp assumes."""
    if not {_TEMPERATURE, _LOG_MULTIPLIER} <= own.keys():
        raise ModelFailed(f"the file lacks the setting {_TEMPERATURE} or {_LOG_MULTIPLIER}")
    return {
        "mscale": 1.0,
        "mscale_all_dim": real(*_stated(own, _LOG_MULTIPLIER)),
        "llama_4_scaling_beta": real(*_stated(own, _TEMPERATURE)),
    }


def _lfm2(header: GGUFHeader, own: Settings, _described: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of LFM2 without heads for keys and values are convolutions."""
    key = "attention.head_count_kv"
    heads = by_layer(key, own[key], header, lambda name, value: number(name, value, least=0))
    if len(set(heads) - {0}) != 1:
        raise ModelFailed(
            f"the file has {key} {shortlist([str(count) for count in heads])}; expected one number"
        )
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,  # the file has the adjusted width
    }


_GEMMA4 = frozenset(
    {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.key_length_swa",
        "attention.shared_kv_layers",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "attention.value_length_swa",
        "embedding_length_per_layer_input",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.dimension_count_swa",
        "rope.freq_base",
        "rope.freq_base_swa",
    }
)


def _gemma4(header: GGUFHeader, own: Settings, _described: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 4's layers with a window have other heads, rotations and widths than those without."""
    local = by_layer(*_stated(own, "attention.sliding_window_pattern"), header, flag)
    n_shared = number(*_stated(own, "attention.shared_kv_layers"), least=0)
    separate = {
        f"blk.{i}.attn_v.weight" in header.tensors
        for i, has_window in enumerate(local[: len(local) - n_shared])
        if not has_window
    }
    token_rows = header.tensors.get("per_layer_token_embd.weight")
    return {
        "layer_types": ["sliding_attention" if yes else "full_attention" for yes in local],
        "num_kv_shared_layers": n_shared,
        "hidden_size_per_layer_input": number(
            *_stated(own, "embedding_length_per_layer_input"), least=0
        ),
        "vocab_size_per_layer_input": 1 if token_rows is None else token_rows.shape[-1],
        "attention_k_eq_v": separate == {False},
        "enable_moe_block": "gemma4.expert_count" in header.metadata,
        **_gemma4_widths(header, own, local, n_shared),
        **_gemma4_rotation(header, own),
    }


def _gemma4_widths(
    header: GGUFHeader, own: Settings, local: Sequence[bool], n_shared: int
) -> dict[str, Any]:
    """Return numbers of heads and neurons. Layers that share keys may have twice the neurons."""
    heads = by_layer(*_stated(own, "attention.head_count_kv"), header, number)
    widths = by_layer(*_stated(own, "feed_forward_length"), header, number)
    global_heads = {count for count, has_window in zip(heads, local, strict=True) if not has_window}
    local_heads = {count for count, has_window in zip(heads, local, strict=True) if has_window}
    width, n_own = widths[0], len(widths) - n_shared
    shared_widths = set(widths[n_own:])
    regular = (
        n_own > 0
        and len(global_heads) == len(local_heads) == 1
        and set(widths[:n_own]) == {width}
        and shared_widths in (set(), {width}, {2 * width})
    )
    if not regular:
        raise ModelFailed(
            "the file has other numbers of heads or neurons in its layers than transformers' "
            f"gemma4; {ADVICE}"
        )
    return {
        "num_key_value_heads": local_heads.pop(),
        "num_global_key_value_heads": global_heads.pop(),
        "intermediate_size": width,
        "use_double_wide_mlp": shared_widths == {2 * width},
    }


def _gemma4_rotation(header: GGUFHeader, own: Settings) -> dict[str, Any]:
    """Return the heads' widths and rotations; layers without a window rotate a part of a head."""
    sizes = {}
    for suffix in ("", "_swa"):
        keys = [f"attention.{part}_length{suffix}" for part in ("key", "value")]
        keys.append(f"rope.dimension_count{suffix}")
        found = {number(*_stated(own, key)) for key in keys}
        if len(found) != 1:
            raise ModelFailed(f"the file has several values of {', '.join(keys)}; {ADVICE}")
        sizes[suffix] = found.pop()
    if FREQUENCIES not in header.tensors:
        raise ModelFailed(f"the file has no tensor {FREQUENCIES}; {ADVICE}")
    divisors = frequency_divisors(header, sizes[""])
    n_rotated = int((divisors == 1).sum())
    if not (divisors[:n_rotated] == 1).all() or (divisors[n_rotated:] < NOT_ROTATED).any():
        raise ModelFailed(f"the file has {FREQUENCIES} with divisors that are not read; {ADVICE}")
    base, local_base = (
        real(key, own.get(key, DEFAULT_BASE)) for key in ("rope.freq_base", "rope.freq_base_swa")
    )
    return {
        "head_dim": sizes["_swa"],
        "global_head_dim": sizes[""],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": n_rotated / len(divisors),
                "rope_theta": base,
            },
        },
    }


def _stated(own: Settings, key: str) -> tuple[str, Any]:
    return key, own[key]


_DEEPSEEK = {
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.q_lora_rank": "q_lora_rank",
    "expert_count": "n_routed_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_shared_count": "n_shared_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_weights_scale": "routed_scaling_factor",
    "rope.dimension_count": "qk_rope_head_dim",
}
_LATENT = frozenset(
    {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.key_length_mla",
        "attention.value_length",
        "attention.value_length_mla",
        "expert_gating_func",
        "expert_weights_norm",
        "leading_dense_block_count",
    }
)


def _deepseek(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek V3 in a form with one wide head for keys and values, the latent vector."""
    _check_sigmoid(own)
    if _LOG_MULTIPLIER in own and header.metadata.get("deepseek2.rope.scaling.type") != YARN:
        raise ModelFailed(f"the file has {_LOG_MULTIPLIER} without YaRN; {ADVICE}")
    latent, rotated = described["kv_lora_rank"], described["qk_rope_head_dim"]
    stated = [own[f"attention.{key}"] for key in ("head_count_kv", "key_length", "value_length")]
    if stated != [1, latent + rotated, latent]:
        raise ModelFailed(
            f"the file has {stated} heads and widths of latent keys and values; expected "
            f"{[1, latent + rotated, latent]}; {ADVICE}"
        )
    whole = number(*_stated(own, "attention.key_length_mla"), least=rotated + 1)
    return {
        "num_key_value_heads": described["num_attention_heads"],
        "qk_nope_head_dim": whole - rotated,
        "v_head_dim": number(*_stated(own, "attention.value_length_mla")),
        "first_k_dense_replace": number(*_stated(own, "leading_dense_block_count"), least=0),
        "norm_topk_prob": flag(*_stated(own, "expert_weights_norm")),
        "q_lora_rank": described.get("q_lora_rank"),
        "num_mtp_layers": 0,
    }


def _deepseek_yarn(own: Settings) -> dict[str, Any]:
    """DeepSeek scales its attention by the square of a multiple of the factor's logarithm.

    All of its checkpoints use the same multiple for the rotation, so that it is not scaled.
    """
    if _LOG_MULTIPLIER not in own:
        raise ModelFailed(f"the file lacks the setting {_LOG_MULTIPLIER}; {ADVICE}")
    multiple = 10 * real(*_stated(own, _LOG_MULTIPLIER))
    return {"mscale": multiple, "mscale_all_dim": multiple}


def _latent_maps(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Join the maps from latent vectors to keys, which are stored transposed, and to values."""
    if not parameter.endswith(".kv_b_proj.weight"):
        return joined(parameter, parts, config)
    n_heads, latent = config.num_attention_heads, config.kv_lora_rank
    expected = [(n_heads, latent, config.qk_nope_head_dim), (n_heads, config.v_head_dim, latent)]
    if [part.shape for part in parts] != expected:
        raise ModelFailed(
            f"the parts of {parameter!r} have shapes {[list(part.shape) for part in parts]}: "
            f"expected {[list(shape) for shape in expected]}"
        )
    keys, values = parts
    return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


_EXPERTS = {
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
}
_LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
}
_DELTA_NET = {
    "attention.key_length": "head_dim",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_DELTA_NET_OWN = frozenset(
    {
        "block_count",
        "full_attention_interval",
        "rope.dimension_count",
        "rope.freq_base",
        "ssm.inner_size",
    }
)
# The sections of a rotation by time, height and width, and the layers that images enter.
_SECTIONS, _IMAGES = "rope.dimension_sections", "n_deepstack_layers"


def _qwen3next(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3-Next has attention in every fourth layer, and gated delta networks in the others."""
    n_further = number(FURTHER, own.get(FURTHER, 0), least=0)
    n_layers = number("block_count", own["block_count"], least=n_further + 1) - n_further
    interval = number(*_stated(own, "full_attention_interval"))
    if n_layers > len(header.tensors):
        raise ModelFailed(
            f"the file has {len(header.tensors)} tensors for {n_layers} layers; expected more"
        )
    n_heads, width = described["linear_num_value_heads"], described["head_dim"]
    inner = number(*_stated(own, "ssm.inner_size"))
    rotated = number(*_stated(own, "rope.dimension_count"))
    if inner % n_heads or n_heads % described["linear_num_key_heads"]:
        raise ModelFailed(
            f"the file has {n_heads} heads in {inner} dimensions and "
            f"{described['linear_num_key_heads']} heads of keys; expected multiples"
        )
    if rotated > width:
        raise ModelFailed(f"the file rotates {rotated} of {width} dimensions; expected fewer")
    return {
        "num_hidden_layers": n_layers,
        "layer_types": [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(n_layers)
        ],
        "linear_value_head_dim": inner // n_heads,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": real(*_stated(own, "rope.freq_base")),
            "partial_rotary_factor": rotated / width,
        },
    }


def _qwen35(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen 3.5 is like Qwen3-Next, with sections of the rotation for images.

    All positions of texts are the same in each section.
    """
    found, sections = _qwen3next(header, own, described), own[_SECTIONS]
    rotated = own["rope.dimension_count"]
    if not isinstance(sections, list) or not all(type(n) is int and n >= 0 for n in sections):
        raise ModelFailed(f"invalid setting {_SECTIONS} {sections!r:.80}; expected whole numbers")
    if 2 * sum(sections) != rotated:
        raise ModelFailed(
            f"the file has {_SECTIONS} {sections!r:.80} for {rotated} dimensions; expected half as "
            "many in all"
        )
    found["rope_parameters"] |= {
        "mrope_section": [size for size in sections if size],
        "mrope_interleaved": True,
    }
    return found


def _delta_nets(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Undo what conversions do to Qwen 3.5's norms and delta networks.

    Value heads are stored by their place beside a key head, and in the model by key head. The decay
    is stored as `-exp(A_log)`, and norms with the 1 that the model adds, except those of heads.
    """
    _, is_delta_net, name = parameter.rpartition(".linear_attn.")
    if not is_delta_net:
        return _norms_less_one(parameter, parts, config)
    values = joined(parameter, parts, config)
    n_keys = config.linear_num_key_heads
    n_beside = config.linear_num_value_heads // n_keys
    fixed = 2 * n_keys * config.linear_key_head_dim  # rows of queries and keys, before the values

    def by_key_head(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.reshape(n_beside, n_keys, -1, *rows.shape[1:])
        return heads.transpose(0, 1).reshape(rows.shape)

    if name == "A_log":
        values = by_key_head(torch.log(-values))
    elif name in {"dt_bias", "in_proj_a.weight", "in_proj_b.weight", "in_proj_z.weight"}:
        values = by_key_head(values)
    elif name in {"in_proj_qkv.weight", "conv1d.weight"}:
        values = torch.cat([values[:fixed], by_key_head(values[fixed:])])
    elif name == "out_proj.weight":
        values = by_key_head(values.T).T.contiguous()
    return values


def _by_key_head(parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Join Qwen3-Next's maps to queries, keys, values and gates, which are stored apart.

    The model has all rows of a key head together.
    """
    n_keys, width = config.linear_num_key_heads, config.linear_key_head_dim
    fixed = n_keys * width
    inner = config.linear_num_value_heads * config.linear_value_head_dim
    first, gates = parts
    if len(first) != 2 * fixed + inner or len(gates) != inner:
        raise ModelFailed(
            f"the file has {len(first)} and {len(gates)} rows for a delta network: expected "
            f"{2 * fixed + inner} and {inner}"
        )
    blocks = [*first.split([fixed, fixed, inner]), gates]
    heads = [block.reshape(n_keys, -1, block.shape[-1]) for block in blocks]
    return torch.cat(heads, 1).flatten(0, 1)


def _decays(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Undo what conversions do to Qwen3-Next, which has value heads in the model's order."""
    if parameter.endswith(".linear_attn.in_proj_qkvz.weight"):
        return _by_key_head(parts, config)
    if parameter.endswith(".linear_attn.A_log"):
        return torch.log(-joined(parameter, parts, config))
    if ".linear_attn." in parameter:
        return joined(parameter, parts, config)
    return _norms_less_one(parameter, parts, config)


_LFM2 = frozenset({"attention.head_count_kv", "shortconv.l_cache"})
_SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_DELTA_NET_STORED = {".linear_attn.A_log": "ssm_a", ".linear_attn.dt_bias": "ssm_dt.bias"}
_LAYER_NORM = "attention.layer_norm_epsilon"

FAMILIES: Mapping[str, Family] = {
    "deepseek2": Family(
        "deepseek_v3",
        attributes=_DEEPSEEK,
        required=_LATENT | _DEEPSEEK.keys() - {"attention.q_lora_rank"},
        own=_LATENT | {_LOG_MULTIPLIER},
        describe=_deepseek,
        scalings=(YARN,),
        yarn=_deepseek_yarn,
        stored={
            ".kv_b_proj.weight": "attn_k_b.weight attn_v_b.weight",
            ".e_score_correction_bias": "exp_probs_b.bias",
        },
        restore=_latent_maps,
    ),
    "gemma": Family("gemma", restore=_norms_less_one),
    "gemma2": Family("gemma2", describe=_head_scale, restore=_norms_less_one),
    "gemma3": Family(
        "gemma3_text",
        required=frozenset({"attention.sliding_window"}),
        describe=_head_scale,
        scalings=(LINEAR,),
        restore=_norms_less_one,
    ),
    "gemma4": Family(
        "gemma4_text",
        attributes=_EXPERTS | {"expert_used_count": "top_k_experts"},
        required=_GEMMA4 - {"rope.freq_base_swa"} | {"attention.sliding_window"},
        own=_GEMMA4,
        describe=_gemma4,
        scalings=(),
        stored={
            ".router.scale": "ffn_gate_inp.scale",
            ".router.per_expert_scale": "ffn_down_exps.scale",
        },
        stacks={"gate_up_proj": ("gate_up_proj",), "down_proj": ("down_proj",)},
    ),
    "gpt-oss": Family(
        "gpt_oss",
        attributes=_LOCAL_EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
        required=frozenset({"attention.key_length", "attention.sliding_window", "expert_count"}),
        yarn=lambda _own: {"truncate": False},
        restore=_interleaved,
    ),
    "gpt2": Family("gpt2", epsilon=_LAYER_NORM, scalings=(), restore=_transposed),
    "granite": Family(
        "granite", attributes=_GRANITE, required=frozenset(_GRANITE), restore=_halves
    ),
    "granitemoe": Family(
        "granitemoe",
        attributes=_GRANITE | _LOCAL_EXPERTS,
        required=frozenset(_GRANITE | _LOCAL_EXPERTS),
        modules={
            ".block_sparse_moe.router": ".block_sparse_moe.router.layer",
            ".block_sparse_moe.experts": ".mlp.experts",
        },
        restore=_halves,
    ),
    "lfm2": Family(
        "lfm2",
        attributes={EPSILON: "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        required=_LFM2,
        own=frozenset({"attention.head_count_kv"}),
        describe=_lfm2,
    ),
    "hunyuan-dense": Family("hunyuan_v1_dense", required=frozenset({"attention.key_length"})),
    "lfm2moe": Family(
        "lfm2_moe",
        attributes=_EXPERTS | {EPSILON: "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        required=_LFM2 | _EXPERTS.keys() | {"expert_gating_func", "leading_dense_block_count"},
        own=frozenset(
            {"attention.head_count_kv", "expert_gating_func", "leading_dense_block_count"}
        ),
        describe=_lfm2moe,
        stored={".expert_bias": "exp_probs_b.bias"},
    ),
    "llama": Family(
        "llama", attributes=_LOCAL_EXPERTS, describe=_mixture_of_llama, restore=_halves
    ),
    "mistral3": Family(
        "llama",
        required=frozenset({"attention.key_length"}),
        own=frozenset({_LOG_MULTIPLIER, _TEMPERATURE}),
        describe=_mistral3,
        yarn=_mistral3_yarn,
        restore=_halves,
    ),
    "olmo2": Family("olmo2"),
    "olmoe": Family(
        "olmoe", attributes={key: _EXPERTS[key] for key in ("expert_count", "expert_used_count")}
    ),
    "phi3": Family("phi3"),
    "qwen2": Family("qwen2"),
    "qwen2moe": Family(
        "qwen2_moe",
        attributes=_EXPERTS | _SHARED,
        common={"norm_topk_prob": False},
    ),
    "qwen2vl": Family("qwen2", own=frozenset({_SECTIONS})),
    "qwen3": Family("qwen3"),
    "qwen3moe": Family("qwen3_moe", attributes=_EXPERTS, common={"norm_topk_prob": True}),
    "qwen3next": Family(
        "qwen3_next",
        attributes=_DELTA_NET | _EXPERTS | _SHARED,
        required=_DELTA_NET_OWN | _DELTA_NET.keys() | _EXPERTS.keys() | _SHARED.keys(),
        common={"norm_topk_prob": True},
        own=_DELTA_NET_OWN,
        describe=_qwen3next,
        scalings=(),
        stored=_DELTA_NET_STORED
        | {".linear_attn.in_proj_qkvz.weight": "attn_qkv.weight attn_gate.weight"},
        restore=_decays,
    ),
    "qwen3vl": Family("qwen3", own=frozenset({_SECTIONS, _IMAGES})),
    "qwen3vlmoe": Family(
        "qwen3_moe",
        attributes=_EXPERTS,
        common={"norm_topk_prob": True},
        own=frozenset({_SECTIONS, _IMAGES}),
    ),
    "qwen35": Family(
        "qwen3_5_text",
        attributes=_DELTA_NET,
        required=_DELTA_NET_OWN | _DELTA_NET.keys() | {_SECTIONS},
        own=_DELTA_NET_OWN | {FURTHER, _SECTIONS},
        describe=_qwen35,
        scalings=(),
        stored=_DELTA_NET_STORED,
        restore=_delta_nets,
    ),
    "qwen35moe": Family(
        "qwen3_5_moe_text",
        attributes=_DELTA_NET | _EXPERTS | _SHARED,
        required=_DELTA_NET_OWN
        | _DELTA_NET.keys()
        | _EXPERTS.keys()
        | _SHARED.keys()
        | {_SECTIONS},
        own=_DELTA_NET_OWN | {FURTHER, _SECTIONS},
        describe=_qwen35,
        scalings=(),
        stored=_DELTA_NET_STORED,
        restore=_delta_nets,
    ),
    "smollm3": Family("smollm3", restore=_halves),
    "starcoder2": Family(
        "starcoder2",
        attributes={_LAYER_NORM: "norm_epsilon"},
        epsilon=_LAYER_NORM,
        describe=_starcoder2,
    ),
}

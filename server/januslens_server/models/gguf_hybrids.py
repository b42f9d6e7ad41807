"""Gemma 4, LFM2, Qwen3-Next, Qwen 3.5 and Falcon-H1, whose layers have mixers of several kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from januslens_server.errors import ModelFailed, shortlist
from januslens_server.models.gguf_family import (
    DEFAULT_BASE,
    EPSILON,
    EXPERTS,
    FREQUENCIES,
    FURTHER,
    LOCAL_BASE,
    NOT_ROTATED,
    SECTIONS,
    SHARED,
    UNEMBEDDING,
    Family,
    Settings,
    by_layer,
    check_sigmoid,
    flag,
    frequency_divisors,
    joined,
    norms_less_one,
    number,
    real,
    stated,
)
from januslens_server.models.gguf_file import ADVICE, GGUFHeader

_GEMMA4_KEYS = frozenset(
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
        LOCAL_BASE,
    }
)


def _gemma4(header: GGUFHeader, own: Settings, _described: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 4's layers with a window have other heads, rotations and widths than those without."""
    local = by_layer(*stated(own, "attention.sliding_window_pattern"), header, flag)
    n_shared = number(*stated(own, "attention.shared_kv_layers"), least=0)
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
            *stated(own, "embedding_length_per_layer_input"), least=0
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
    heads = by_layer(*stated(own, "attention.head_count_kv"), header, number)
    widths = by_layer(*stated(own, "feed_forward_length"), header, number)
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
        found = {number(*stated(own, key)) for key in keys}
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
        real(key, own.get(key, DEFAULT_BASE)) for key in ("rope.freq_base", LOCAL_BASE)
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


GEMMA4 = Family(
    "gemma4_text",
    attributes=EXPERTS | {"expert_used_count": "top_k_experts"},
    required=_GEMMA4_KEYS - {LOCAL_BASE} | {"attention.sliding_window"},
    own=_GEMMA4_KEYS,
    describe=_gemma4,
    scalings=(),
    tensors=frozenset({FREQUENCIES}),
    stored={
        ".router.scale": "ffn_gate_inp.scale",
        ".router.per_expert_scale": "ffn_down_exps.scale",
    },
    stacks={"gate_up_proj": ("gate_up_proj",), "down_proj": ("down_proj",)},
)


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


def _lfm2moe(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """LFM2 with experts, whose router is a sigmoid with normalised scores."""
    check_sigmoid(own)
    found = _lfm2(header, own, described)
    del found["block_auto_adjust_ff_dim"]
    return found | {
        "num_dense_layers": number(*stated(own, "leading_dense_block_count"), least=0),
        "use_expert_bias": any(name.endswith(".exp_probs_b.bias") for name in header.tensors),
    }


_LFM2_KEYS = frozenset({"attention.head_count_kv", "shortconv.l_cache"})
LFM2 = Family(
    "lfm2",
    attributes={EPSILON: "norm_eps", "shortconv.l_cache": "conv_L_cache"},
    required=_LFM2_KEYS,
    own=frozenset({"attention.head_count_kv"}),
    describe=_lfm2,
)
LFM2_MOE = Family(
    "lfm2_moe",
    attributes=EXPERTS | {EPSILON: "norm_eps", "shortconv.l_cache": "conv_L_cache"},
    required=_LFM2_KEYS | EXPERTS.keys() | {"expert_gating_func", "leading_dense_block_count"},
    own=frozenset({"attention.head_count_kv", "expert_gating_func", "leading_dense_block_count"}),
    describe=_lfm2moe,
    stored={".expert_bias": "exp_probs_b.bias"},
)

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


def _qwen3next(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3-Next has attention in every fourth layer, and gated delta networks in the others."""
    n_further = number(FURTHER, own.get(FURTHER, 0), least=0)
    n_layers = number("block_count", own["block_count"], least=n_further + 1) - n_further
    interval = number(*stated(own, "full_attention_interval"))
    if n_layers > len(header.tensors):
        raise ModelFailed(
            f"the file has {len(header.tensors)} tensors for {n_layers} layers; expected more"
        )
    n_heads, width = described["linear_num_value_heads"], described["head_dim"]
    inner = number(*stated(own, "ssm.inner_size"))
    rotated = number(*stated(own, "rope.dimension_count"))
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
            "rope_theta": real(*stated(own, "rope.freq_base")),
            "partial_rotary_factor": rotated / width,
        },
    }


def _qwen35(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen 3.5 is like Qwen3-Next, with sections of the rotation for images.

    All positions of texts are the same in each section.
    """
    found, sections = _qwen3next(header, own, described), own[SECTIONS]
    rotated = own["rope.dimension_count"]
    if not isinstance(sections, list) or not all(type(n) is int and n >= 0 for n in sections):
        raise ModelFailed(f"invalid setting {SECTIONS} {sections!r:.80}; expected whole numbers")
    if 2 * sum(sections) != rotated:
        raise ModelFailed(
            f"the file has {SECTIONS} {sections!r:.80} for {rotated} dimensions; expected half as "
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
        return norms_less_one(parameter, parts, config)
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
    return norms_less_one(parameter, parts, config)


_DELTA_NET_STORED = {".linear_attn.A_log": "ssm_a", ".linear_attn.dt_bias": "ssm_dt.bias"}
QWEN3_NEXT = Family(
    "qwen3_next",
    attributes=_DELTA_NET | EXPERTS | SHARED,
    required=_DELTA_NET_OWN | _DELTA_NET.keys() | EXPERTS.keys() | SHARED.keys(),
    common={"norm_topk_prob": True},
    own=_DELTA_NET_OWN,
    describe=_qwen3next,
    scalings=(),
    stored=_DELTA_NET_STORED
    | {".linear_attn.in_proj_qkvz.weight": "attn_qkv.weight attn_gate.weight"},
    restore=_decays,
)
QWEN35 = Family(
    "qwen3_5_text",
    attributes=_DELTA_NET,
    required=_DELTA_NET_OWN | _DELTA_NET.keys() | {SECTIONS},
    own=_DELTA_NET_OWN | {FURTHER, SECTIONS},
    describe=_qwen35,
    scalings=(),
    stored=_DELTA_NET_STORED,
    restore=_delta_nets,
)
QWEN35_MOE = Family(
    "qwen3_5_moe_text",
    attributes=_DELTA_NET | EXPERTS | SHARED,
    required=_DELTA_NET_OWN | _DELTA_NET.keys() | EXPERTS.keys() | SHARED.keys() | {SECTIONS},
    own=_DELTA_NET_OWN | {FURTHER, SECTIONS},
    describe=_qwen35,
    scalings=(),
    stored=_DELTA_NET_STORED,
    restore=_delta_nets,
)


_FALCON_H1 = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.group_count": "mamba_n_groups",
    "ssm.inner_size": "mamba_d_ssm",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_n_heads",
}


def _falcon_h1(header: GGUFHeader, _own: Settings, _described: Mapping[str, Any]) -> dict[str, Any]:
    """Falcon-H1's multipliers are factors of the stored weights, so that all of them are 1 here."""
    if UNEMBEDDING not in header.tensors:
        raise ModelFailed(
            f"the file has no {UNEMBEDDING}, and its embedding has a multiplier that the head has "
            f"not; {ADVICE}"
        )
    return {
        "mamba_conv_bias": "blk.0.ssm_conv1d.bias" in header.tensors,
        "mamba_proj_bias": "blk.0.ssm_in.bias" in header.tensors,
    }


def _negative_decays(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Return `A_log`, which is stored as `-exp(A_log)`."""
    values = joined(parameter, parts, config)
    return torch.log(-values) if parameter.endswith(".A_log") else values


FALCON_H1 = Family(
    "falcon_h1",
    attributes=_FALCON_H1,
    required=frozenset({*_FALCON_H1, "attention.key_length"}),
    describe=_falcon_h1,
    stored={".A_log": "ssm_a", ".mamba.D": "ssm_d", ".dt_bias": "ssm_dt.bias"},
    restore=_negative_decays,
)

"""The architectures of GGUF files that are read.

Metadata that a family does not mention may change the numbers, so a file with it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from januslens_server.errors import ModelFailed
from januslens_server.models.gguf_family import (
    DEFAULT_BASE,
    EXPERTS,
    FREQUENCIES,
    IMAGES,
    LINEAR,
    LOCAL_BASE,
    LOG_MULTIPLIER,
    SECTIONS,
    SHARED,
    TEMPERATURE,
    YARN,
    Family,
    Settings,
    check_sigmoid,
    flag,
    frequency_divisors,
    halves,
    joined,
    norms_less_one,
    number,
    real,
    stated,
)
from januslens_server.models.gguf_file import ADVICE, GGUFHeader
from januslens_server.models.gguf_hybrids import (
    FALCON_H1,
    GEMMA4,
    LFM2,
    LFM2_MOE,
    QWEN3_NEXT,
    QWEN35,
    QWEN35_MOE,
)


def _transposed(parameter: str, parts: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Transpose GPT-2's maps, whose parameters have the shape `[d_in, d_out]`."""
    values = joined(parameter, parts, config)
    mapped = parameter.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return values.T.contiguous() if mapped else values


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


def _mistral3(header: GGUFHeader, own: Settings, _described: Mapping[str, Any]) -> dict[str, Any]:
    """Ministral 3 scales queries by their position, with YaRN; Mistral Small is like Llama."""
    if own and header.metadata.get("mistral3.rope.scaling.type") != YARN:
        raise ModelFailed(f"the file has {' and '.join(sorted(own))} without YaRN; {ADVICE}")
    return {"model_type": "ministral3"} if own else {}


def _mistral3_yarn(own: Settings) -> dict[str, Any]:
    """Return what Ministral 3 adds to YaRN; its mscale is 1, as llama.cpp assumes."""
    if not {TEMPERATURE, LOG_MULTIPLIER} <= own.keys():
        raise ModelFailed(f"the file lacks the setting {TEMPERATURE} or {LOG_MULTIPLIER}")
    return {
        "mscale": 1.0,
        "mscale_all_dim": real(*stated(own, LOG_MULTIPLIER)),
        "llama_4_scaling_beta": real(*stated(own, TEMPERATURE)),
    }


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
        "leading_dense_block_count",
    }
)
_ORIGINAL, _ATTENTION = "rope.scaling.original_context_length", "rope.scaling.attn_factor"
_PHI3 = frozenset(
    {
        _ATTENTION,
        _ORIGINAL,
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
    }
)
# LongRoPE's divisors of frequencies in texts that are not longer than the original context, and
# in longer ones.
_LONG_ROPE = {
    "rope_factors_short.weight": "short_factor",
    "rope_factors_long.weight": "long_factor",
}


def _phi3(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """Phi rotates a part of each head, may have LongRoPE, and a window of 0 stands for none."""
    width = described["hidden_size"] // max(1, described["num_attention_heads"])
    rotated = number(*stated(own, "rope.dimension_count"))
    window = number("attention.sliding_window", own.get("attention.sliding_window", 0), least=0)
    whole = described["max_position_embeddings"]
    original = number(_ORIGINAL, own.get(_ORIGINAL, whole), least=2)
    kind = own.get("rope.scaling.type", "none")
    if rotated > width or kind not in ("none", "longrope"):
        raise ModelFailed(
            f"the file rotates {rotated} of {width} dimensions with rope.scaling {kind!r:.80}; "
            f"expected at most {width}, and 'longrope' or 'none'; {ADVICE}"
        )
    rotary: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": real("rope.freq_base", own.get("rope.freq_base", DEFAULT_BASE)),
        "partial_rotary_factor": rotated / width,
    }
    if found := _LONG_ROPE.keys() & header.tensors.keys():
        factor = whole / original
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        if not math.isclose(real(_ATTENTION, own.get(_ATTENTION)), attention, rel_tol=1e-5):
            raise ModelFailed(
                f"the file has {_ATTENTION} {own[_ATTENTION]!r}, but transformers uses {attention}"
                f"; {ADVICE}"
            )
        rotary |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            **{
                _LONG_ROPE[name]: frequency_divisors(header, rotated, name).tolist()
                for name in found
            },
        }
    elif kind != "none" or _ATTENTION in own:
        raise ModelFailed(f"the file has LongRoPE without {' and '.join(_LONG_ROPE)}; {ADVICE}")
    return {
        "sliding_window": window or None,
        "original_max_position_embeddings": original,
        "rope_parameters": rotary,
    }


# Whether the weights of the chosen experts are divided by their sum; files do not say no.
_NORMED = "expert_weights_norm"


def _deepseek(header: GGUFHeader, own: Settings, described: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek V3 in a form with one wide head for keys and values, the latent vector."""
    check_sigmoid(own)
    if LOG_MULTIPLIER in own and header.metadata.get("deepseek2.rope.scaling.type") != YARN:
        raise ModelFailed(f"the file has {LOG_MULTIPLIER} without YaRN; {ADVICE}")
    latent, rotated = described["kv_lora_rank"], described["qk_rope_head_dim"]
    found = [own[f"attention.{key}"] for key in ("head_count_kv", "key_length", "value_length")]
    if found != [1, latent + rotated, latent]:
        raise ModelFailed(
            f"the file has {found} heads and widths of latent keys and values; expected "
            f"{[1, latent + rotated, latent]}; {ADVICE}"
        )
    whole = number(*stated(own, "attention.key_length_mla"), least=rotated + 1)
    return {
        "num_key_value_heads": described["num_attention_heads"],
        "qk_nope_head_dim": whole - rotated,
        "v_head_dim": number(*stated(own, "attention.value_length_mla")),
        "first_k_dense_replace": number(*stated(own, "leading_dense_block_count"), least=0),
        "norm_topk_prob": flag(_NORMED, own.get(_NORMED, False)),
        "q_lora_rank": described.get("q_lora_rank"),
        "num_mtp_layers": 0,
    }


def _deepseek_yarn(own: Settings) -> dict[str, Any]:
    """DeepSeek scales its attention by the square of a multiple of the factor's logarithm.

    All of its checkpoints use the same multiple for the rotation, so that it is not scaled.
    """
    if LOG_MULTIPLIER not in own:
        raise ModelFailed(f"the file lacks the setting {LOG_MULTIPLIER}; {ADVICE}")
    multiple = 10 * real(*stated(own, LOG_MULTIPLIER))
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


_LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
}
_LAYER_NORM = "attention.layer_norm_epsilon"

FAMILIES: Mapping[str, Family] = {
    "deepseek2": Family(
        "deepseek_v3",
        attributes=_DEEPSEEK,
        required=_LATENT | _DEEPSEEK.keys() - {"attention.q_lora_rank"},
        own=_LATENT | {LOG_MULTIPLIER, _NORMED},
        describe=_deepseek,
        scalings=(YARN,),
        yarn=_deepseek_yarn,
        stored={
            ".kv_b_proj.weight": "attn_k_b.weight attn_v_b.weight",
            ".e_score_correction_bias": "exp_probs_b.bias",
        },
        restore=_latent_maps,
    ),
    "falcon-h1": FALCON_H1,
    "gemma": Family("gemma", restore=norms_less_one),
    "gemma2": Family("gemma2", describe=_head_scale, restore=norms_less_one),
    "gemma3": Family(
        "gemma3_text",
        required=frozenset({"attention.sliding_window"}),
        own=frozenset({LOCAL_BASE}),
        describe=_head_scale,
        scalings=(LINEAR,),
        local_base=True,
        restore=norms_less_one,
    ),
    "gemma4": GEMMA4,
    "gpt-oss": Family(
        "gpt_oss",
        attributes=_LOCAL_EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
        required=frozenset({"attention.key_length", "attention.sliding_window", "expert_count"}),
        yarn=lambda _own: {"truncate": False},
        restore=_interleaved,
    ),
    "gpt2": Family("gpt2", epsilon=_LAYER_NORM, scalings=(), restore=_transposed),
    "granite": Family("granite", attributes=_GRANITE, required=frozenset(_GRANITE), restore=halves),
    "granitemoe": Family(
        "granitemoe",
        attributes=_GRANITE | _LOCAL_EXPERTS,
        required=frozenset(_GRANITE | _LOCAL_EXPERTS),
        modules={
            ".block_sparse_moe.router": ".block_sparse_moe.router.layer",
            ".block_sparse_moe.experts": ".mlp.experts",
        },
        restore=halves,
    ),
    "hunyuan-dense": Family("hunyuan_v1_dense", required=frozenset({"attention.key_length"})),
    "lfm2": LFM2,
    "lfm2moe": LFM2_MOE,
    "llama": Family(
        "llama",
        attributes=_LOCAL_EXPERTS,
        describe=_mixture_of_llama,
        tensors=frozenset({FREQUENCIES}),
        restore=halves,
    ),
    "mistral3": Family(
        "llama",
        required=frozenset({"attention.key_length"}),
        own=frozenset({LOG_MULTIPLIER, TEMPERATURE}),
        describe=_mistral3,
        yarn=_mistral3_yarn,
        restore=halves,
    ),
    "olmo2": Family("olmo2"),
    "olmoe": Family(
        "olmoe", attributes={key: EXPERTS[key] for key in ("expert_count", "expert_used_count")}
    ),
    "phi3": Family(
        "phi3",
        required=frozenset({"rope.dimension_count"}),
        own=_PHI3,
        describe=_phi3,
        scalings=(),
        tensors=frozenset(_LONG_ROPE),
    ),
    "qwen2": Family("qwen2"),
    "qwen2moe": Family(
        "qwen2_moe",
        attributes=EXPERTS | SHARED,
        common={"norm_topk_prob": False},
    ),
    "qwen2vl": Family("qwen2", own=frozenset({SECTIONS})),
    "qwen3": Family("qwen3"),
    "qwen3moe": Family("qwen3_moe", attributes=EXPERTS, common={"norm_topk_prob": True}),
    "qwen3next": QWEN3_NEXT,
    "qwen3vl": Family("qwen3", own=frozenset({SECTIONS, IMAGES})),
    "qwen3vlmoe": Family(
        "qwen3_moe",
        attributes=EXPERTS,
        common={"norm_topk_prob": True},
        own=frozenset({SECTIONS, IMAGES}),
    ),
    "qwen35": QWEN35,
    "qwen35moe": QWEN35_MOE,
    "smollm3": Family("smollm3", restore=halves),
    "starcoder2": Family(
        "starcoder2",
        attributes={_LAYER_NORM: "norm_epsilon"},
        epsilon=_LAYER_NORM,
        describe=_starcoder2,
    ),
}

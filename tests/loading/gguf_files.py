"""Write GGUF files of tiny random models, as llama.cpp's converters write them.

The settings, names and changes of weights follow the folder `conversion` of llama.cpp, and are
written with gguf's own writer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from tests.architectures.cases import GRANITE_MULTIPLIERS, VOCABULARY, Case
from tests.architectures.tiny_models import plain

WIDE = {"intermediate_size": 64}  # Q8_0 stores blocks of 32 values
HEADS = {"head_dim": 12, "num_key_value_heads": 2}
GEMMA = HEADS | {"query_pre_attn_scalar": 12, "sliding_window": 4, "tie_word_embeddings": True}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LOCAL_AND_SCALED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
GEMMA4 = {
    "intermediate_size": 64,
    "sliding_window": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000.0,
        },
    },
}
DELTA_NETS = {
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
STATE_SPACE = {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "mamba_d_ssm": 40,
    "mamba_n_heads": 5,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 6,
    "mamba_d_conv": 3,
}
EXPERTS = FEW_EXPERTS | {"moe_intermediate_size": 32}
CASES = {
    "gpt2": Case("gpt2", "gguf", {"n_inner": 64, "tie_word_embeddings": True}),
    "llama": Case("llama", "gguf", WIDE | {"num_key_value_heads": 2, "rope_theta": 500.0}),
    "qwen2": Case("qwen2", "gguf", WIDE | {"num_key_value_heads": 2}),
    "qwen3": Case("qwen3", "gguf", WIDE | HEADS),
    "llama 3": Case(
        "llama", "gguf, 3", WIDE | {"num_key_value_heads": 2, "rope_parameters": LLAMA_3}
    ),
    "qwen3 with YaRN": Case("qwen3", "gguf, YaRN", WIDE | HEADS | {"rope_parameters": YARN}),
    "gpt-oss": Case(
        "gpt_oss",
        "gguf",
        WIDE
        | {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 4}
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": YARN | {"truncate": False}},
    ),
    "lfm2": Case(
        "lfm2",
        "gguf",
        {
            "intermediate_size": 64,
            "block_auto_adjust_ff_dim": False,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_hidden_layers": 3,
            "conv_L_cache": 4,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4": Case(
        "gemma4_text",
        "gguf",
        GEMMA4
        | {
            "num_key_value_heads": 2,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "layer_types": [*["sliding_attention", "full_attention"] * 2, "full_attention"],
        },
    ),
    "gemma4 with experts": Case(
        "gemma4_text",
        "gguf, experts",
        GEMMA4
        | FEW_EXPERTS
        | {
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "enable_moe_block": True,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "deepseek2": Case(
        "deepseek_v3",
        "gguf",
        {
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "falcon-h1": Case("falcon_h1", "gguf", STATE_SPACE),
    "falcon-h1 with multipliers": Case(
        "falcon_h1",
        "gguf, multipliers",
        STATE_SPACE
        | {
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "mlp_multipliers": [0.7, 0.3],
            "key_multiplier": 0.4,
            "attention_out_multiplier": 0.9,
            "attention_in_multiplier": 1.1,
            "ssm_multipliers": [0.4, 0.5, 0.6, 0.7, 0.8],
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.3,
        },
    ),
    "gemma3 of newer converters": Case(
        "gemma3_text",
        "gguf, base of windows",
        WIDE
        | GEMMA
        | {"layer_types": None, "num_hidden_layers": 6}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ),
    "hunyuan-dense": Case("hunyuan_v1_dense", "gguf", WIDE | HEADS),
    "lfm2moe": Case(
        "lfm2_moe",
        "gguf",
        EXPERTS
        | {
            "intermediate_size": 64,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "mistral3": Case("llama", "gguf, Mistral Small", WIDE | HEADS),
    "mistral3 with YaRN": Case(
        "ministral3",
        "gguf",
        WIDE
        | HEADS
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 4,  # shorter than the prompt
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.3,
            }
        },
    ),
    "qwen2vl": Case("qwen2", "gguf, text of images", WIDE | {"num_key_value_heads": 2}),
    "qwen3vl": Case("qwen3", "gguf, text of images", WIDE | HEADS),
    "qwen3vlmoe": Case(
        "qwen3_moe", "gguf, text of images", WIDE | HEADS | EXPERTS | {"norm_topk_prob": True}
    ),
    "qwen3next": Case(
        "qwen3_next",
        "gguf",
        DELTA_NETS
        | EXPERTS
        | {
            "shared_expert_intermediate_size": 96,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "qwen3moe": Case("qwen3_moe", "gguf", WIDE | HEADS | EXPERTS | {"norm_topk_prob": True}),
    "qwen2moe": Case(
        "qwen2_moe",
        "gguf",
        WIDE
        | EXPERTS
        | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 96}
        | {"norm_topk_prob": False},
    ),
    "mixtral": Case(
        "mixtral",
        "gguf",
        WIDE | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmo2": Case("olmo2", "gguf", WIDE | {"num_key_value_heads": 2}),
    "olmoe": Case(
        "olmoe", "gguf", {"intermediate_size": 32, "num_key_value_heads": 2} | FEW_EXPERTS
    ),
    "phi3 without window": Case("phi3", "gguf, no window", WIDE | {"num_key_value_heads": 2}),
    "phi3 with LongRoPE": Case(
        "phi3",
        "gguf, LongRoPE",
        WIDE
        | {
            "num_key_value_heads": 2,
            "sliding_window": 262144,
            "original_max_position_embeddings": 8,  # shorter than the prompt
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.0, 3.0],
                "original_max_position_embeddings": 8,
            },
        },
    ),
    "phi3": Case("phi3", "gguf", WIDE | {"num_key_value_heads": 2, "sliding_window": 4}),
    "granite": Case("granite", "gguf", WIDE | GRANITE_MULTIPLIERS | {"num_key_value_heads": 2}),
    "granitemoe": Case(
        "granitemoe",
        "gguf",
        WIDE
        | GRANITE_MULTIPLIERS
        | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen35": Case("qwen3_5_text", "gguf", DELTA_NETS | {"tie_word_embeddings": True}),
    "qwen35moe": Case(
        "qwen3_5_moe_text",
        "gguf",
        DELTA_NETS | EXPERTS | {"intermediate_size": None, "shared_expert_intermediate_size": 96},
    ),
    "smollm3": Case(
        "smollm3",
        "gguf",
        WIDE
        | {
            "num_key_value_heads": 2,
            "no_rope_layers": None,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
        },
    ),
    "starcoder2": Case(
        "starcoder2", "gguf", WIDE | {"num_key_value_heads": 2, "sliding_window": None}
    ),
    "gemma": Case("gemma", "gguf", WIDE | HEADS | {"tie_word_embeddings": True}),
    "gemma2": Case("gemma2", "gguf", WIDE | GEMMA | {"final_logit_softcapping": 3.0}),
    "gemma3 scaled": Case(
        "gemma3_text",
        "gguf, scaled",
        WIDE
        | GEMMA
        | {"layer_types": None, "num_hidden_layers": 6, "rope_parameters": LOCAL_AND_SCALED},
    ),
    "gemma3": Case("gemma3_text", "gguf", WIDE | GEMMA | {"layer_types": None}),
}
# The architecture's name in the file, of cases that are named otherwise.
ARCHITECTURES = {
    "llama 3": "llama",
    "mixtral": "llama",
    "falcon-h1 with multipliers": "falcon-h1",
    "gemma3 scaled": "gemma3",
    "gemma3 of newer converters": "gemma3",
    "gemma4 with experts": "gemma4",
    "phi3 with LongRoPE": "phi3",
    "phi3 without window": "phi3",
    "qwen3 with YaRN": "qwen3",
    "mistral3 with YaRN": "mistral3",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MERGES = ["1 2", "12 3", "123 4", "a b", "ab c", "Ġ a"]
ADDED = ["<bos>", "<eos>"]
BYTES = sorted(ByteLevel.alphabet(), key=lambda symbol: (symbol != "Ġ", symbol))
TOKENS = [*ADDED, *BYTES][: VOCABULARY - len(MERGES)]
BYTE_LEVEL: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": [*TOKENS, *(merge.replace(" ", "") for merge in MERGES)],
    "token_type": [CONTROL, CONTROL, *[NORMAL] * (VOCABULARY - 2)],
    "merges": MERGES,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


Settings = dict[str, Any]
Stored = Iterator[tuple[str, torch.Tensor]]


def settings_of(family: str, case: Case) -> Settings:
    """The metadata that a conversion writes for this configuration."""
    config: Any = case.config()
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    width = config.n_inner if family == "gpt2" else getattr(config, "intermediate_size", None)
    if width is not None:  # Qwen 3.5's mixtures have experts only
        found["feed_forward_length"] = width
    return found | SETTINGS.get(family, decoder_settings)(config)


def decoder_settings(config: Any) -> Settings:
    """Heads, rotation, norms and experts of an ordinary decoder."""
    rotary = config.rope_parameters
    whole = rotary.get("full_attention", rotary)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.freq_base": float(whole["rope_theta"]),
    }
    if hasattr(config, "rms_norm_eps"):
        found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if hasattr(config, "num_local_experts") or hasattr(config, "num_experts"):
        found |= {"expert_count": 4, "expert_used_count": 2}
    return found | scaling_settings(whole)


def scaling_settings(rotary: dict[str, Any]) -> Settings:
    if rotary["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rotary["factor"]}
    if rotary["rope_type"] != "yarn":
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rotary["factor"],
        "rope.scaling.original_context_length": rotary["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }


def windowed_settings(config: Any) -> Settings:
    return decoder_settings(config) | {"attention.sliding_window": config.sliding_window}


def phi3_settings(config: Any) -> Settings:
    """Phi's files have no width of heads."""
    rotary = config.rope_parameters
    width = config.hidden_size // config.num_attention_heads
    found = decoder_settings(config) | {
        "attention.sliding_window": config.sliding_window or 0,
        "rope.dimension_count": int(width * rotary.get("partial_rotary_factor", 1)),
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
    }
    del found["attention.key_length"], found["attention.value_length"]
    if rotary["rope_type"] == "longrope":
        original, whole = config.original_max_position_embeddings, config.max_position_embeddings
        factor = math.sqrt(1 + math.log(whole / original) / math.log(original))
        found |= {"rope.scaling.attn_factor": factor, "rope.scaling.type": "longrope"}
    return found


def gemma2_settings(config: Any) -> Settings:
    return windowed_settings(config) | {
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def gemma3_settings(config: Any) -> Settings:
    """Older converters wrote no base for layers with a window, which was the default."""
    local = config.rope_parameters["sliding_attention"]["rope_theta"]
    base = {} if local == 10000.0 else {"rope.freq_base_swa": local}
    return windowed_settings(config) | base


def gemma4_settings(config: Any) -> Settings:
    """What differs between the layers of Gemma 4."""
    n_layers = config.num_hidden_layers
    first_shared = n_layers - config.num_kv_shared_layers
    found = {
        "attention.head_count_kv": [
            config.per_layer_config[i].num_key_value_heads for i in range(n_layers)
        ],
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.key_length_swa": 8,
        "attention.value_length_swa": 8,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [
            kind == "sliding_attention" for kind in config.layer_types
        ],
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope.freq_base": 1000.0,
        "rope.freq_base_swa": 100.0,
        "rope.dimension_count": 16,
        "rope.dimension_count_swa": 8,
    }
    if config.use_double_wide_mlp:
        widths = [config.intermediate_size * (1 + (i >= first_shared)) for i in range(n_layers)]
        found["feed_forward_length"] = widths
    if config.enable_moe_block:
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.top_k_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return found


def granite_settings(config: Any) -> Settings:
    return decoder_settings(config) | {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def lfm2_settings(config: Any) -> Settings:
    return {
        "attention.head_count_kv": [
            config.num_key_value_heads * (kind == "full_attention") for kind in config.layer_types
        ],
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "shortconv.l_cache": config.conv_L_cache,
    }


def lfm2moe_settings(config: Any) -> Settings:
    return lfm2_settings(config) | {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 2,
        "leading_dense_block_count": config.num_dense_layers,
    }


def mistral3_settings(config: Any) -> Settings:
    rotary = config.rope_parameters
    if rotary["rope_type"] == "default":
        return decoder_settings(config)
    return decoder_settings(config) | {
        "attention.temperature_scale": rotary["llama_4_scaling_beta"],
        "rope.scaling.yarn_log_multiplier": rotary["mscale_all_dim"],
    }


def deepseek2_settings(config: Any) -> Settings:
    """Latent attention as attention with one head for keys and values, and its real widths."""
    width, rotary = config.qk_rope_head_dim, config.rope_parameters
    return scaling_settings(rotary) | {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + width,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + width,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "expert_count": config.n_routed_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 2,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_shared_count": config.n_shared_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": config.routed_scaling_factor,
        "leading_dense_block_count": config.first_k_dense_replace,
        "rope.dimension_count": width,
        "rope.freq_base": float(rotary["rope_theta"]),
        "rope.scaling.yarn_log_multiplier": 0.1 * rotary["mscale_all_dim"],
        "vocab_size": config.vocab_size,
    }


def qwen2moe_settings(config: Any) -> Settings:
    return qwen3moe_settings(config) | {
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size
    }


def qwen3next_settings(config: Any) -> Settings:
    """Attention in every fourth layer."""
    rotary = config.rope_parameters
    n_heads = config.linear_num_value_heads
    return {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "full_attention_interval": 4,
        "rope.dimension_count": int(config.head_dim * rotary["partial_rotary_factor"]),
        "rope.freq_base": rotary["rope_theta"],
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.inner_size": config.linear_value_head_dim * n_heads,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.time_step_rank": n_heads,
    } | expert_settings(config)


def qwen35_settings(config: Any) -> Settings:
    """Sections of the rotation, and a block behind the last layer."""
    return qwen3next_settings(config) | {
        "block_count": config.num_hidden_layers + 1,
        "nextn_predict_layers": 1,
        "rope.dimension_sections": [*config.rope_parameters["mrope_section"], 0],
    }


def expert_settings(config: Any) -> Settings:
    if not hasattr(config, "num_experts"):
        return {}
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
    }


def qwen3moe_settings(config: Any) -> Settings:
    return decoder_settings(config) | {"expert_feed_forward_length": config.moe_intermediate_size}


IMAGES = {"rope.dimension_sections": [2, 2, 2, 0], "n_deepstack_layers": 3}


def falcon_h1_settings(config: Any) -> Settings:
    return decoder_settings(config) | {
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_d_ssm,
        "ssm.state_size": config.mamba_d_state,
        "ssm.time_step_rank": config.mamba_n_heads,
        "vocab_size": config.vocab_size,
    }


SETTINGS: dict[str, Callable[[Any], Settings]] = {
    "deepseek2": deepseek2_settings,
    "falcon-h1": falcon_h1_settings,
    "gemma2": gemma2_settings,
    "gemma3": gemma3_settings,
    "gemma4": gemma4_settings,
    "gpt-oss": lambda config: (
        windowed_settings(config) | {"expert_feed_forward_length": config.intermediate_size}
    ),
    "gpt2": lambda config: {"attention.layer_norm_epsilon": config.layer_norm_epsilon},
    "granite": granite_settings,
    "granitemoe": granite_settings,
    "hunyuan-dense": lambda config: (
        decoder_settings(config)
        | {
            "rope.scaling.type": "none",
            "rope.scaling.factor": 1.0,
            "rope.scaling.original_context_length": 32,
        }
    ),
    "lfm2": lfm2_settings,
    "lfm2moe": lfm2moe_settings,
    "mistral3": mistral3_settings,
    "phi3": phi3_settings,
    "qwen2moe": qwen2moe_settings,
    "qwen2vl": lambda config: decoder_settings(config) | {"rope.dimension_sections": [2, 1, 1, 0]},
    "qwen35": qwen35_settings,
    "qwen35moe": qwen35_settings,
    "qwen3next": qwen3next_settings,
    "qwen3vl": lambda config: decoder_settings(config) | IMAGES,
    "qwen3vlmoe": lambda config: qwen3moe_settings(config) | IMAGES,
    "qwen3moe": qwen3moe_settings,
    "starcoder2": lambda config: (
        decoder_settings(config) | {"attention.layer_norm_epsilon": config.norm_epsilon}
    ),
}


def tensors_of(family: str, case: Case) -> dict[str, np.ndarray]:
    """The tensors as conversions to GGUF write them, by their names there."""
    network = plain(case)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(kind, network.config.num_hidden_layers)
    convert = CONVERSIONS.get(family, unstacked)
    written = {}
    for parameter, values in network.state_dict().items():
        if parameter == "lm_head.weight" and network.config.tie_word_embeddings:
            continue
        for known, stored in convert(parameter, values, network.config):
            name = known if known.startswith("blk.") else renamed(known, names)
            written[name] = np.ascontiguousarray(stored.numpy())
    if family.startswith("qwen35"):  # of the head that predicts one token more
        n_layers = network.config.num_hidden_layers
        written[f"blk.{n_layers}.nextn.eh_proj.weight"] = np.ones((2, 32), np.float32)
    if family == "gemma4":
        written["rope_freqs.weight"] = np.array([1, 1, *[1e30] * 6], np.float32)
    if case.name == "gguf, LongRoPE":
        for length in ("short", "long"):
            factors = network.config.rope_parameters[f"{length}_factor"]
            written[f"rope_factors_{length}.weight"] = np.array(factors, np.float32)
    if case.name == "gguf, 3":
        written["rope_freqs.weight"] = divisors(network)
    return written


def renamed(parameter: str, names: Any) -> str:
    stem, _, suffix = parameter.rpartition(".")
    if suffix not in {"weight", "bias"}:
        return f"{names.get_name(parameter)}.weight"
    return f"{names.get_name(stem) or names.get_name(parameter)}.{suffix}"


def block_of(parameter: str) -> str:
    """The beginning of the stored names of a layer."""
    return f"blk.{parameter.removeprefix('model.layers.').partition('.')[0]}"


def unstacked(parameter: str, values: torch.Tensor, _config: Any) -> Stored:
    """Give each matrix of the experts a name of its own, as older checkpoints do."""
    if parameter.endswith("experts.gate_up_proj"):
        gate, up = values.chunk(2, dim=1)
        yield parameter.replace("gate_up_proj", "gate_proj.weight"), gate
        yield parameter.replace("gate_up_proj", "up_proj.weight"), up
    elif parameter.endswith("experts.down_proj"):
        yield f"{parameter}.weight", values
    elif ".shared_expert_gate." in parameter:
        yield parameter, values.squeeze()
    else:
        yield parameter, values


def rotated(parameter: str, values: torch.Tensor, config: Any) -> Stored:
    """Put rows that are rotated together beside each other."""
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    for name, stored in unstacked(parameter, values, config):
        found = stored
        for module, n_heads in heads.items():
            if module in name:
                halves = stored.reshape(n_heads, 2, len(stored) // n_heads // 2, -1)
                found = halves.swapaxes(1, 2).reshape(stored.shape)
        yield name, found


def granitemoe_tensors(parameter: str, values: torch.Tensor, config: Any) -> Stored:
    """Use newer names than those that the library knows."""
    for name, stored in rotated(parameter, values, config):
        known = name.replace("block_sparse_moe.experts", "mlp.experts")
        yield known.replace("router", "router.layer"), stored


def gpt2_tensors(parameter: str, values: torch.Tensor, _config: Any) -> Stored:
    mapped = any(part in parameter for part in ("c_attn.w", "c_proj.w", "c_fc.w"))
    yield parameter, values.T if mapped else values


def gemma_tensors(parameter: str, values: torch.Tensor, _config: Any) -> Stored:
    yield parameter, values + 1 if parameter.endswith("norm.weight") else values


def gemma4_tensors(parameter: str, values: torch.Tensor, _config: Any) -> Stored:
    if parameter.endswith("router.scale"):
        yield f"{block_of(parameter)}.ffn_gate_inp.scale", values
    elif parameter.endswith("per_expert_scale"):
        yield f"{block_of(parameter)}.ffn_down_exps.scale", values
    else:
        yield parameter, values


def gpt_oss_tensors(parameter: str, values: torch.Tensor, _config: Any) -> Stored:
    """Transpose the experts, and put gate and up apart."""
    if ".experts." not in parameter:
        yield parameter, values
        return
    kind = "bias" if parameter.endswith("_bias") else "weight"
    stored, matrix = values if kind == "bias" else values.mT, parameter.removesuffix("_bias")
    if matrix.endswith("gate_up_proj"):
        yield matrix.replace("gate_up_proj", f"gate_proj.{kind}"), stored[:, 0::2]
        yield matrix.replace("gate_up_proj", f"up_proj.{kind}"), stored[:, 1::2]
    else:
        yield f"{matrix}.{kind}", stored


def lfm2_tensors(parameter: str, values: torch.Tensor, _config: Any) -> Stored:
    yield parameter, values.squeeze(1) if ".conv.conv." in parameter else values


def lfm2moe_tensors(parameter: str, values: torch.Tensor, config: Any) -> Stored:
    if parameter.endswith(".expert_bias"):
        yield f"{block_of(parameter)}.exp_probs_b.bias", values
    elif ".conv.conv." in parameter:
        yield parameter, values.squeeze(1)
    else:
        yield from unstacked(parameter, values, config)


def deepseek2_tensors(parameter: str, values: torch.Tensor, config: Any) -> Stored:
    """Split the map from latent vectors into keys, transposed, and values."""
    if parameter.endswith("kv_b_proj.weight"):
        heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, found = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield parameter.replace("kv_b_proj", "k_b_proj"), keys.mT
        yield parameter.replace("kv_b_proj", "v_b_proj"), found
    elif parameter.endswith("e_score_correction_bias"):
        yield f"{block_of(parameter)}.exp_probs_b.bias", values
    else:
        yield from unstacked(parameter, values, config)


def qwen3next_tensors(parameter: str, values: torch.Tensor, config: Any) -> Stored:
    """Put queries, keys, values and gates of all key heads apart, and change norms and decays."""
    name = parameter.rpartition(".linear_attn.")[2]
    n_keys, width = config.linear_num_key_heads, config.linear_key_head_dim
    beside = config.linear_num_value_heads // n_keys * config.linear_value_head_dim
    if name == "in_proj_qkvz.weight":
        heads = values.reshape(n_keys, -1, values.shape[-1])
        first, gates = heads.split([2 * width + beside, beside], 1)
        apart = [part.flatten(0, 1) for part in first.split([width, width, beside], 1)]
        yield f"{block_of(parameter)}.attn_qkv.weight", torch.cat(apart)
        yield f"{block_of(parameter)}.attn_gate.weight", gates.flatten(0, 1)
    elif name == "A_log":
        yield f"{block_of(parameter)}.ssm_a", -torch.exp(values)
    elif name == "dt_bias":
        yield f"{block_of(parameter)}.ssm_dt.bias", values
    elif name == "conv1d.weight":
        yield parameter, values.squeeze(1)
    elif name.endswith("norm.weight") and ".linear_attn." not in parameter:
        yield parameter, values + 1
    else:
        yield from unstacked(parameter, values, config)


def qwen35_tensors(parameter: str, values: torch.Tensor, config: Any) -> Stored:
    """Order value heads by their places beside key heads, and change norms and decays."""
    n_keys, width = config.linear_num_key_heads, config.linear_value_head_dim
    n_beside = config.linear_num_value_heads // n_keys
    order = [key * n_beside + i for i in range(n_beside) for key in range(n_keys)]
    rows = [head * width + j for head in order for j in range(width)]
    fixed = 2 * n_keys * config.linear_key_head_dim
    name = parameter.rpartition(".linear_attn.")[2]
    if name == "A_log":
        yield f"{block_of(parameter)}.ssm_a", -torch.exp(values)[order]
    elif name == "dt_bias":
        yield f"{block_of(parameter)}.ssm_dt.bias", values[order]
    elif name in {"in_proj_a.weight", "in_proj_b.weight"}:
        yield parameter, values[order]
    elif name == "in_proj_z.weight":
        yield parameter, values[rows]
    elif name in {"in_proj_qkv.weight", "conv1d.weight"}:
        yield parameter, torch.cat([values[:fixed], values[fixed:][rows]]).squeeze(1)
    elif name == "out_proj.weight":
        yield parameter, values[:, rows]
    elif name.endswith("norm.weight") and ".linear_attn." not in parameter:
        yield parameter, values + 1
    else:
        yield from unstacked(parameter, values, config)


def falcon_h1_tensors(parameter: str, values: torch.Tensor, config: Any) -> Stored:
    """Multiply the weights by the multipliers, and change decays."""
    gate, down = config.mlp_multipliers
    factors = {
        ".gate_proj.": gate,
        ".down_proj.": down,
        ".q_proj.": config.attention_in_multiplier,
        ".k_proj.": config.attention_in_multiplier * config.key_multiplier,
        ".v_proj.": config.attention_in_multiplier,
        ".o_proj.": config.attention_out_multiplier,
        ".out_proj.": config.ssm_out_multiplier,
        "lm_head.": config.lm_head_multiplier,
        ".embed_tokens.": config.embedding_multiplier,
    }
    stored = values
    for name, factor in factors.items():
        if name in parameter:
            stored = values * factor
    if ".in_proj." in parameter:
        state = config.mamba_n_groups * config.mamba_d_state
        sizes = [config.mamba_d_ssm] * 2 + [state] * 2 + [config.mamba_n_heads]
        rows = torch.tensor(config.ssm_multipliers).repeat_interleave(torch.tensor(sizes))
        stored = values * config.ssm_in_multiplier * rows[:, None]
    for name, tail in {".A_log": "ssm_a", ".mamba.D": "ssm_d", ".dt_bias": "ssm_dt.bias"}.items():
        if parameter.endswith(name):
            stored = -torch.exp(values) if name == ".A_log" else values
            column = stored if name == ".dt_bias" else stored[:, None]
            yield f"{block_of(parameter)}.{tail}", column
            return
    yield parameter, stored.squeeze(1) if ".conv1d.weight" in parameter else stored


CONVERSIONS: dict[str, Callable[[str, torch.Tensor, Any], Stored]] = {
    "deepseek2": deepseek2_tensors,
    "falcon-h1": falcon_h1_tensors,
    "gemma": gemma_tensors,
    "gemma2": gemma_tensors,
    "gemma3": gemma_tensors,
    "gemma4": gemma4_tensors,
    "gpt-oss": gpt_oss_tensors,
    "gpt2": gpt2_tensors,
    "granite": rotated,
    "granitemoe": granitemoe_tensors,
    "lfm2": lfm2_tensors,
    "lfm2moe": lfm2moe_tensors,
    "mistral3": rotated,
    "llama": rotated,
    "qwen35": qwen35_tensors,
    "qwen3next": qwen3next_tensors,
    "qwen35moe": qwen35_tensors,
    "smollm3": rotated,
}


def divisors(network: Any) -> np.ndarray:
    """What transformers divides the unscaled frequencies by."""
    found = network.model.rotary_emb.inv_freq.double().numpy()
    unscaled = 500000.0 ** (-np.arange(len(found)) / len(found))
    divided: np.ndarray = (unscaled / found).astype(np.float32)
    return divided


def write(
    path: Path,
    family: str = "llama",
    *,
    settings: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    further: dict[str, np.ndarray] | None = None,
    quantized: str | None = None,
) -> Path:
    """Write a tiny model with gguf's own writer; `quantized` is the type of its matrices."""
    case = CASES[family]
    family = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, family)
    for key, value in (settings_of(family, case) | (settings or {})).items():
        add(writer, key if key.startswith("split.") else f"{family}.{key}", value)
    for key, value in (BYTE_LEVEL | (tokenizer or {})).items():
        add(writer, f"tokenizer.ggml.{key}", value)
    for name, array in (tensors_of(family, case) | (further or {})).items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        elif quantized is None or array.ndim < 2 or array.shape[-1] % 32:
            writer.add_tensor(name, array)
        else:
            kind = gguf.GGMLQuantizationType[quantized]
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

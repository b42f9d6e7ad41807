"""Tiny configurations of every family; together they enable every option that is off by default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)

VOCABULARY = 120
CONTEXT = 32
PROMPT_LENGTH = 9

# The window is shorter than the prompt, the soft-caps are below the scores and logits.
WINDOW = 4
SOFT_CAP = 2.0
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 3.0, 5.0, 7.0],
    "original_max_position_embeddings": 8,
}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
}
ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Case:
    """One configuration of a family: `settings` added to the common sizes.

    `attention` is the attention implementation of the plain model, `length` the length of the
    prompt.
    """

    family: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    attention: str = "eager"
    length: int = PROMPT_LENGTH

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"

    @property
    def prompt(self) -> list[int]:
        random = torch.Generator().manual_seed(len(self.id))
        return torch.randint(1, VOCABULARY, (self.length,), generator=random).tolist()

    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = AutoConfig.for_model(
            self.family, **SIZES | OWN_NAMES.get(self.family, {}) | self.settings
        )
        return config


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
# The part of a multimodal model that reads images.
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SANDWICH = {"head_dim": 12, "query_pre_attn_scalar": 20, "layer_types": ALTERNATING}
OWN_NAMES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4, "seq_length": CONTEXT},
    "gemma": {"head_dim": 12},
    "gemma2": SANDWICH,
    "gemma3": {
        "text_config": SIZES | SANDWICH | {"sliding_window": WINDOW, "num_key_value_heads": 2},
        "vision_config": TOWER,
    },
    "gemma3_text": SANDWICH,
    "gpt2": {"n_inner": 40},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["local", "global"], 1]]},
    "gptj": {"n_inner": 40},
    "mpt": {"max_seq_len": CONTEXT},
    "opt": {"ffn_dim": 40, "dropout": 0.0},
    "qwen3": {"head_dim": 12},
    "smollm3": {"no_rope_layers": [1, 0]},
}
GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.6,
    "logits_scaling": 1.7,
}
FALCON_GROUPS = {"new_decoder_architecture": True, "num_kv_heads": 2}

CASES = (
    Case("bloom", "power of two"),
    Case("bloom", "six heads", {"n_head": 6, "hidden_size": 36}),
    Case("cohere", "grouped, norms", {"num_key_value_heads": 2, "use_qk_norm": True}),
    Case("cohere", "biased", {"attention_bias": True, "logit_scale": 0.7}),
    Case("falcon", "multi-query"),
    Case("falcon", "groups, two norms", FALCON_GROUPS | {"bias": True}),
    Case("falcon", "groups, one norm", FALCON_GROUPS | {"num_ln_in_parallel_attn": 1}),
    Case(
        "falcon",
        "alibi, sequential",
        {
            "alibi": True,
            "num_attention_heads": 6,
            "hidden_size": 36,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
        attention="sdpa",  # eager adds ALiBi twice
    ),
    Case("gemma", "multi-query", {"num_key_value_heads": 1}),
    Case("gemma", "grouped, biased", {"num_key_value_heads": 2, "attention_bias": True}),
    Case(
        "gemma2",
        "grouped, capped, window",
        {
            "num_key_value_heads": 2,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": SOFT_CAP,
            "final_logit_softcapping": SOFT_CAP,
        },
    ),
    Case("gemma2", "multi-head, biased", {"num_key_value_heads": 4, "attention_bias": True}),
    Case("gemma3", "grouped, window"),
    Case(
        "gemma3_text",
        "grouped, two rotations, window",
        {
            "num_key_value_heads": 2,
            "sliding_window": WINDOW,
            "rope_parameters": LOCAL_AND_GLOBAL,
            "final_logit_softcapping": SOFT_CAP,
        },
    ),
    Case("gemma3_text", "multi-query, biased", {"num_key_value_heads": 1, "attention_bias": True}),
    Case("gpt2", "plain"),
    Case("gpt2", "inverse layer", {"scale_attn_by_inverse_layer_idx": True}),
    Case("gpt_neo", "window", {"window_size": WINDOW}),
    Case("gpt_neox", "parallel", {"rotary_pct": 0.5}),
    Case("gpt_neox", "sequential", {"rotary_pct": 1.0, "use_parallel_residual": False}),
    Case("gptj", "partial rotary", {"rotary_dim": 4}),
    Case("granite", "grouped", {"num_key_value_heads": 2} | GRANITE_MULTIPLIERS),
    Case("granite", "biased", {"attention_bias": True, "mlp_bias": True} | GRANITE_MULTIPLIERS),
    Case("llama", "grouped", {"num_key_value_heads": 2}),
    Case("llama", "multi-query, biased", {"num_key_value_heads": 1, "attention_bias": True}),
    Case("mistral", "grouped, window", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    Case("mistral", "multi-query", {"num_key_value_heads": 1, "sliding_window": None}),
    Case("mpt", "clipped", {"attn_config": {"clip_qkv": 1.0}}),
    Case("mpt", "six heads", {"n_heads": 6, "d_model": 36, "attn_config": {"softmax_scale": 0.3}}),
    Case("olmo", "grouped, clipped", {"num_key_value_heads": 2, "clip_qkv": 0.6}),
    Case("olmo", "multi-head", {"num_key_value_heads": 4}),
    Case("olmo2", "grouped, biased", {"num_key_value_heads": 2, "attention_bias": True}),
    Case("olmo2", "multi-query", {"num_key_value_heads": 1}),
    Case("opt", "plain"),
    Case("opt", "projected", {"word_embed_proj_dim": 16}),
    Case("opt", "bare", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    Case("phi", "grouped, norms", {"num_key_value_heads": 2, "qk_layernorm": True}),
    Case("phi", "multi-head"),
    Case("phi3", "grouped, window", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    Case("phi3", "long rotation", {"num_key_value_heads": 1, "rope_parameters": LONG_ROPE}),
    Case(
        "qwen2",
        "grouped, window",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    Case("qwen2", "multi-head, YaRN", {"num_key_value_heads": 4, "rope_parameters": YARN}),
    Case(
        "qwen3",
        "grouped, window",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    Case(
        "qwen3",
        "multi-query, biased, YaRN",
        {"num_key_value_heads": 1, "attention_bias": True, "rope_parameters": YARN},
    ),
    Case(
        "smollm3",
        "grouped, window",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    Case(
        "smollm3",
        "multi-head, biased",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    Case("stablelm", "grouped, norms", {"num_key_value_heads": 2, "qk_layernorm": True}),
    Case(
        "stablelm",
        "parallel, biased",
        {"num_key_value_heads": 4, "use_qkv_bias": True, "use_parallel_residual": True},
    ),
    Case("starcoder2", "grouped, window", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    Case("starcoder2", "multi-head, bare", {"num_key_value_heads": 4, "use_bias": False}),
)
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
MIXTURES = (
    Case("mixtral", "window", EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW}),
    Case(
        "qwen3_moe",
        "mixed with dense",
        EXPERTS
        | {
            "num_hidden_layers": 3,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
            "head_dim": 12,
            "norm_topk_prob": True,
        },
    ),
    Case("qwen3_moe", "weights as they are", EXPERTS | {"num_experts": 5, "head_dim": 8}),
    Case("olmoe", "clipped", EXPERTS | {"num_experts": 4, "clip_qkv": 0.5}),
    Case(
        "gpt_oss",
        "sinks, window",
        EXPERTS
        | {
            "num_local_experts": 4,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
)
# Mixtures without an adapter: shared experts beside the routed ones, scaled or averaged.
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
BESIDE_FULL = {"sliding_window": WINDOW, "layer_types": ALTERNATING}
LATENT_WIDTHS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
ROUTED = {
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "attention_bias": True,
}
SHARED_EXPERTS = (
    Case(
        "glm4_moe",
        "dense first, scaled",
        GROUPED | ROUTED | {"n_shared_experts": 2, "use_qk_norm": True},
    ),
    Case(
        "deepseek_v3",
        "latent queries, YaRN",
        LATENT_WIDTHS | ROUTED | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    # As in DeepSeek V3, but a norm reads the sum of the experts.
    Case(
        "axk1",
        "norm after experts",
        LATENT_WIDTHS | ROUTED | {"n_shared_experts": 2},
    ),
    Case(
        "deepseek_v2",
        "latent queries, complex rotation",
        LATENT_WIDTHS | ROUTED | {"n_shared_experts": 2, "topk_method": "group_limited_greedy"},
    ),
    Case(
        "qwen2_moe",
        "gated shared expert",
        GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    Case(
        "cohere2_moe",
        "averaged, parallel",
        GROUPED
        | {
            "num_experts": 4,
            "num_shared_experts": 1,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "mlp_layer_types": ["sparse", "sparse"],
        },
    ),
)
# Families without an adapter, which are read by their structure.
# The decoder of an encoder-decoder family: it has cross-attention, which is never called.
DECODER_ALONE = {
    "is_encoder_decoder": False,
    "is_decoder": True,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
}
PHI4_TOWERS = {
    "audio_config": {
        "depthwise_separable_out_channel": 16,
        "ext_pw_out_channel": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "nemo_conv_channels": 16,
        "num_attention_heads": 2,
        "num_blocks": 1,
    },
    "vision_config": {
        "crop_size": 28,
        "hidden_size": 16,
        "image_size": 28,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
}
WITHOUT_ADAPTER = tuple(
    Case(family, "automatic", {"num_key_value_heads": 2, "head_dim": 8} | settings)
    for family, settings in (
        ("apertus", {}),  # its activation function has parameters
        ("arcee", {}),
        ("codegen", {"rotary_dim": 4}),
        (
            "cohere_compass_text",  # parallel; one kind of layer does not rotate
            {
                "layer_types": ALTERNATING,
                "logit_scale": 0.3,
                "rope_parameters": {
                    "full_attention": None,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                },
                "sliding_window": WINDOW,
            },
        ),
        ("ernie4_5", {"use_bias": True}),
        ("exaone4", {}),
        ("glm", {"attention_bias": True}),
        ("glm4", {}),
        ("gpt_bigcode", {}),
        (
            "granitemoe",
            GRANITE_MULTIPLIERS | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        ("helium", {}),
        ("hunyuan_v1_dense", {"attention_bias": True}),
        (
            "laguna",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "moe_routed_scaling_factor": 1.7,
                "gating": "per-head",
            },
        ),
        ("mbart", DECODER_ALONE),
        (
            "mimo_v2_flash",  # values are narrower than keys, and multiplied by a number
            BESIDE_FULL
            | {
                "v_head_dim": 6,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "routed_scaling_factor": 2.5,
                "mlp_layer_types": ["dense", "sparse"],
                "attention_bias": True,
            },
        ),
        (
            "minimax_m2",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ),
        ("nanochat", {}),
        ("nemotron", {}),
        ("olmo3", {"sliding_window": WINDOW, "layer_types": ALTERNATING}),
        ("persimmon", {"qk_layernorm": True}),
        ("phi4_multimodal", PHI4_TOWERS),
        (
            "qwen3_next",
            {
                "layer_types": ["full_attention", "full_attention"],
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
            },
        ),
        ("seed_oss", {}),
        ("vaultgemma", {"query_pre_attn_scalar": 20}),
    )
)
# Latent attention with a dense MLP, and a multiplier that depends on the depth.
LATENT = (
    Case(
        "minicpm3",
        "latent queries",
        LATENT_WIDTHS,
    ),
)
# Chunks, queries scaled by their position in a layer without rotation, and experts whose inputs are
# weighted.
LLAMA4 = (
    Case(
        "llama4_text",
        "chunks, weighted inputs",
        GROUPED
        | {
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "moe_layers": [0, 1],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 24,
            "attention_chunk_size": 5,
            "floor_scale": 3,
            "attention_bias": True,
        },
    ),
)
# Per-layer inputs beside the MLP, blocks that multiply their sum, normed values, and heads that
# differ by layer; in the last layer, keys and values have one map.
GEMMA4 = (
    Case(
        "gemma4_text",
        "per-layer inputs, one map for keys and values",
        {
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "head_dim": 8,
            "global_head_dim": 12,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": VOCABULARY,
            "final_logit_softcapping": SOFT_CAP,
        }
        | BESIDE_FULL,
    ),
)
# Mixtures that combine what the cases above have: which layers, routers and attention differ.
# An indexer chooses fewer sources than the prompt has.
INDEXED = {"index_topk": 3, "index_n_heads": 2, "index_head_dim": 8}
FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
COMBINED = tuple(
    Case(family, "automatic", settings, length=6)
    for family, settings in (
        (
            "afmoe",
            GROUPED
            | FOUR_EXPERTS
            | BESIDE_FULL
            | {"num_dense_layers": 1, "route_scale": 1.7, "mup_enabled": True},
        ),
        (
            "aria_text",
            {
                "num_key_value_heads": 2,
                "moe_num_experts": 4,
                "moe_topk": 2,
                "moe_num_shared_experts": 2,
                "attention_bias": True,
            },
        ),
        ("dots1", {"num_key_value_heads": 2, "norm_topk_prob": True} | ROUTED | BESIDE_FULL),
        (
            "ernie4_5_moe",
            {
                "num_key_value_heads": 2,
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_num_shared_experts": 2,
                "moe_intermediate_size": 16,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": 1,
                "use_bias": True,
            },
        ),
        (
            "deepseek_v32",
            LATENT_WIDTHS | ROUTED | INDEXED,
        ),
        ("glm4_moe_lite", LATENT_WIDTHS | ROUTED),
        # The second layer attends to the sources that the indexer of the first chose.
        (
            "glm_moe_dsa",
            LATENT_WIDTHS | ROUTED | INDEXED | {"indexer_types": ["full", "shared"]},
        ),
        (
            "granitemoehybrid",
            GRANITE_MULTIPLIERS
            | {
                "num_key_value_heads": 2,
                "layer_types": ["full_attention", "full_attention"],
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "shared_intermediate_size": 24,
                "position_embedding_type": "rope",
                "mamba_n_heads": 8,
                "attention_bias": True,
            },
        ),
        ("hy_v3", GROUPED | FOUR_EXPERTS | {"num_shared_experts": 1, "attention_bias": True}),
        ("mellum", GROUPED | FOUR_EXPERTS | BESIDE_FULL | {"mlp_layer_types": ["dense", "sparse"]}),
        (
            "phimoe",
            {
                "num_key_value_heads": 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": WINDOW,
                "attention_bias": True,
                "lm_head_bias": True,
            },
        ),
        ("sarvam_mla", LATENT_WIDTHS | {"q_lora_rank": None} | ROUTED),
        ("youtu", LATENT_WIDTHS | {"attention_bias": True}),
    )
)
# A state-space mixer beside attention, and a multiplier for each map and each sublayer.
FALCON_H1 = (
    Case(
        "falcon_h1",
        "mixer beside attention, multipliers",
        {
            "num_key_value_heads": 2,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 0.6,
            "key_multiplier": 0.7,
            "ssm_in_multiplier": 1.3,
            "ssm_out_multiplier": 0.3,
            "ssm_multipliers": [0.8, 1.1, 0.75, 0.65, 1.2],
            "mlp_multipliers": [1.4, 0.55],
            "embedding_multiplier": 2.2,
            "lm_head_multiplier": 0.45,
            "attention_bias": True,
            "mlp_bias": True,
            "projectors_bias": True,
        },
        length=8,
    ),
)
# Blocks with attention or an MLP, but not both. Experts have no gate; in the first case they read
# and write latent vectors, in the second the router chooses among groups.
ONE_SUBLAYER = GROUPED | {
    "num_hidden_layers": 3,
    "layers_block_type": ["full_attention", "mlp", "moe"],
    "mtp_layers_block_type": [],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
}
NEMOTRON_H = (
    Case(
        "nemotron_h",
        "one sublayer per block, latent experts",
        ONE_SUBLAYER | {"mlp_bias": True, "moe_latent_size": 24},
        length=8,
    ),
)
UNGATED = (
    *NEMOTRON_H,
    Case(
        "nemotron_h",
        "groups of experts",
        ONE_SUBLAYER
        | {
            "layers_block_type": ["full_attention", "moe", "moe"],
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
        },
        length=8,
    ),
)
READ_BY_STRUCTURE = (
    WITHOUT_ADAPTER + SHARED_EXPERTS + LATENT + LLAMA4 + GEMMA4 + FALCON_H1 + NEMOTRON_H + COMBINED
)
MEASURED = CASES + MIXTURES + READ_BY_STRUCTURE
FAMILIES = tuple(sorted({case.family for case in CASES + MIXTURES}))

# Lengths beyond what the structure's probe and the self-check can see, shorter than the prompt.
LONG_WINDOW = 12
LONG_PROMPT = 30
BESIDE_WINDOW = {"sliding_window": LONG_WINDOW, "num_key_value_heads": 2}
LATE_LONG_ROPE = {
    "rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 16},
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALED_QUERIES = {
    "head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.5,
    },
}
BEYOND_LENGTHS = tuple(
    Case(family, f"beyond {name}", settings, length=LONG_PROMPT)
    for family, name, settings in (
        ("arcee", "unused window and cap", BESIDE_WINDOW | {"attn_logit_softcapping": SOFT_CAP}),
        ("exaone4", "window", BESIDE_WINDOW | {"layer_types": ALTERNATING}),
        ("gemma2", "window", SANDWICH | BESIDE_WINDOW),
        ("gemma3_text", "window", SANDWICH | BESIDE_WINDOW),
        ("glm", "unused window", BESIDE_WINDOW | {"head_dim": 8}),
        ("gpt_neo", "window", {"window_size": LONG_WINDOW}),
        ("helium", "unused window", BESIDE_WINDOW | {"head_dim": 8}),
        ("llama", "dynamic rotation", {"rope_parameters": DYNAMIC}),
        ("llama", "llama 3 rotation", {"rope_parameters": LLAMA3}),
        ("llama", "unused window", BESIDE_WINDOW),
        ("ministral", "window", BESIDE_WINDOW | {"head_dim": 8, "layer_types": ALTERNATING}),
        ("ministral3", "scaled queries", BESIDE_WINDOW | SCALED_QUERIES),
        ("mistral", "window", BESIDE_WINDOW),
        ("nemotron", "unused window", BESIDE_WINDOW),
        ("olmo3", "window", BESIDE_WINDOW | {"layer_types": ALTERNATING}),
        ("phi3", "long rotation", LATE_LONG_ROPE),
        ("phi3", "window", BESIDE_WINDOW),
        ("qwen2", "unused window", BESIDE_WINDOW | {"use_sliding_window": False}),
        ("seed_oss", "unused window", BESIDE_WINDOW | {"head_dim": 8}),
        ("starcoder2", "window", BESIDE_WINDOW),
        ("vaultgemma", "window", SANDWICH | BESIDE_WINDOW | {"query_pre_attn_scalar": 20}),
    )
)

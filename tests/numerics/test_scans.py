"""Compare estimates of models with state spaces and delta rules with measured work."""

from __future__ import annotations

from typing import Any

import pytest

from januslens_server.pipelines.cost import demand_of
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_gradient_lens, resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.specs import GradientLensSpec, NegativeLogLikelihood, TraceSpec
from tests.architectures.cases import Case
from tests.architectures.tiny_models import resident
from tests.support.measured_work import PeakMemory, work

# Maximum ratio of an upper bound to the actual value.
LOOSEST_MEMORY, LOOSEST_FLOPS = 4.0, 2.6
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
ATTENTION_FIRST = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention"] + ["linear_attention"] * 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 64,
}
# Types without a layer whose matrices have names of their own; their gradients are not requested.
STREAM_ONLY = {"mamba", "mamba2"}
CASES = (
    Case("mamba", "state space", COMMON | {"num_hidden_layers": 2}),
    Case(
        "jamba",
        "state space above attention",
        COMMON
        | EXPERTS
        | {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 0}
        | {"mamba_dt_rank": 4},
    ),
    Case(
        "mamba2",
        "short chunks",
        COMMON | {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "chunk_size": 32},
    ),
    Case(
        "mamba2",
        "long chunks",
        COMMON | {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "chunk_size": 256},
    ),
    Case("falcon_h1", "state space beside attention", COMMON | MAMBA_2 | {"mamba_d_ssm": 128}),
    Case(
        "granitemoehybrid",
        "state space above attention",
        COMMON
        | EXPERTS
        | MAMBA_2
        | {"num_hidden_layers": 3, "layer_types": ["attention", "mamba", "mamba"]}
        | {"shared_intermediate_size": 32, "mamba_expand": 2},
    ),
    Case(
        "qwen3_next",
        "gated delta rule",
        COMMON
        | ATTENTION_FIRST
        | EXPERTS
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32}
        | {"linear_value_head_dim": 16, "head_dim": 16, "shared_expert_intermediate_size": 16},
    ),
    Case(
        "olmo_hybrid",
        "gated delta rule",
        COMMON
        | ATTENTION_FIRST
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 32},
    ),
    Case(
        "kimi_linear",
        "delta rule with a decay per channel",
        COMMON
        | ATTENTION_FIRST
        | EXPERTS
        | {"num_key_value_heads": 4, "linear_num_heads": 4, "linear_head_dim": 32}
        | {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
        | {"v_head_dim": 16, "n_group": 1, "topk_group": 1},
    ),
)


@pytest.mark.parametrize("length", [6, 70])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_estimates_of_scans_are_upper_bounds_and_not_far_above(case: Case, length: int) -> None:
    """Prompts of one chunk and of two; the gradient passes back through all mixers above."""
    model, ids = resident(case), tuple(range(3, 3 + length))
    traced = resolve_trace(model, TraceSpec(ids))
    list(trace(traced, lambda: None))  # allocates the buffers that all requests share
    done, asked = work(trace(traced, lambda: None)), demand_of(traced)
    assert 1 <= asked.memory / done.memory <= LOOSEST_MEMORY
    assert 1 <= asked.flops / done.flops <= LOOSEST_FLOPS
    if case.family in STREAM_ONLY:
        return
    gradient = resolve_gradient_lens(model, GradientLensSpec(ids, NegativeLogLikelihood((5,))))
    with PeakMemory() as memory:
        list(gradient_lens(gradient, lambda: None))
    assert 1 <= demand_of(gradient).memory / memory.peak <= LOOSEST_MEMORY

"""Variants whose residual is not the sum of its parts are refused with the reason."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from januslens_server.errors import ModelFailed
from januslens_server.models.adapters import view_of
from tests.architectures.cases import Case

REFUSED = (
    (Case("opt", "post-norms", {"do_layer_norm_before": False}), "do_layer_norm_before=False"),
    (Case("opt", "no final norm", {"_remove_final_layer_norm": True}), "final norm"),
    (
        Case("bloom", "normed residual", {"apply_residual_connection_post_layernorm": True}),
        "apply_residual_connection_post_layernorm",
    ),
    (Case("bloom", "slices", {"slow_but_exact": True, "pretraining_tp": 2}), "slow_but_exact"),
    (Case("falcon", "eager alibi", {"alibi": True}), "SDPA"),
    (Case("gemma", "bidirectional", {"use_bidirectional_attention": True}), "causal"),
    (Case("gemma2", "bidirectional", {"use_bidirectional_attention": True}), "causal"),
    (Case("gemma3_text", "bidirectional", {"use_bidirectional_attention": True}), "causal"),
)


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=[case.id for case, _ in REFUSED])
def test_variant_is_refused_with_its_reason(case: Case, reason: str) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(case.config(), attn_implementation="eager")
    with pytest.raises(ModelFailed, match=reason):
        view_of(network)

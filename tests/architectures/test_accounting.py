"""A model with parameters that no part of the view includes is refused by their names."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from januslens_server.models.adapters import view_of
from januslens_server.models.experts import Experts
from januslens_server.models.views import Mlp, ModelView, without_unread_parameters
from tests.architectures.cases import CASES, MIXTURES, WITHOUT_ADAPTER, Case
from tests.architectures.tiny_models import plain, resident

SHARED_EXPERT = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
}


def with_reason(view: ModelView, reason: str) -> None:
    """Check that a view shows only the residual stream of some layer, for this reason."""
    found = [level.reason for level in view.limited(range(view.facts.n_layers))]
    assert any(re.search(reason, each) for each in found), found


@pytest.mark.parametrize("data_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["dots1", "glm4_moe"])
def test_shared_expert_is_a_part_in_every_data_type(family: str, data_type: torch.dtype) -> None:
    network = plain(Case(family, "shared expert", SHARED_EXPERT))
    view = view_of(copy.deepcopy(network).to(data_type))
    assert isinstance(view.parts(0).mlp, Mlp)  # the first layer is dense
    mixture = view.parts(1).mlp
    assert isinstance(mixture, Experts)
    assert mixture.shared is not None


@pytest.mark.parametrize("case", [*CASES[::7], *MIXTURES[::2]], ids=lambda case: case.id)
def test_unknown_parameter_leaves_the_stream_and_is_named(case: Case) -> None:
    model = resident(case)
    block: Any = model.view.blocks[1].module
    block.register_parameter("layer_scale", nn.Parameter(torch.ones(32)))
    try:
        with_reason(
            without_unread_parameters(model.network, model.view),
            r"unknown parameters: .*\.1\.layer_scale",
        )
    finally:
        del block.layer_scale
    assert without_unread_parameters(model.network, model.view) is model.view


def test_unused_part_of_a_called_module_leaves_the_stream() -> None:
    """No token of the pass reaches this part, as with an expert that is not chosen."""
    model = resident(CASES[0])
    mlp: Any = model.view.blocks[1].module.mlp
    mlp.skipped = nn.Linear(32, 32)
    try:
        with_reason(
            without_unread_parameters(model.network, model.view),
            r"unknown parameters: .*\.1\.mlp\.skipped\.weight",
        )
    finally:
        del mlp.skipped


def test_cross_attention_that_is_called_leaves_the_stream() -> None:
    """The decoder calls its cross-attention, as it does with an encoder."""
    model = resident(next(case for case in WITHOUT_ADAPTER if case.family == "mbart"))

    def call(module: Any, _args: Any, _output: Any) -> None:
        module.encoder_attn.q_proj(torch.ones(1, 32))

    handle = model.view.blocks[1].module.register_forward_hook(call)
    try:
        with_reason(
            without_unread_parameters(model.network, model.view), r"layers\.1\.encoder_attn"
        )
    finally:
        handle.remove()
    assert without_unread_parameters(model.network, model.view) is model.view


def test_fused_projection_with_an_unread_column_leaves_the_stream() -> None:
    """No linear map covers one column of Phi-3's `gate_up_proj`."""
    model = resident(next(case for case in CASES if case.id == "phi3-grouped, window"))
    block = model.view.parts(0)
    assert isinstance(block.mlp, Mlp)
    assert block.mlp.up is not None
    short = replace(block.mlp, up=replace(block.mlp.up, columns=range(40, 79)))
    view = replace(model.view, blocks=(replace(block, mlp=short), *model.view.blocks[1:]))
    with_reason(
        without_unread_parameters(model.network, view), r"layers\.0\.mlp\.gate_up_proj\.weight"
    )


@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.id)
def test_shared_expert_leaves_the_stream_and_is_named(case: Case) -> None:
    model = resident(case)
    mlp: Any = model.view.parts(0).mlp
    mlp.block.shared_expert = nn.Linear(32, 16, bias=False)
    try:
        with_reason(
            without_unread_parameters(model.network, model.view), r"mlp\.shared_expert\.weight"
        )
    finally:
        del mlp.block.shared_expert

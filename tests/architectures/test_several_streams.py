"""Models with several residual streams, or a hidden layer before the head, against plain models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from januslens_server.errors import InvalidRequest, ModelFailed
from januslens_server.lens.merge import Merge
from januslens_server.models.adapters import stream, view_of
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.project import project_vectors
from januslens_server.pipelines.resolve import resolve_activations, resolve_project
from januslens_server.results import Level, NodeKind, Side, SiteValues
from januslens_server.specs import (
    ActivationsSpec,
    Add,
    InterventionSpec,
    LensKind,
    LensSpec,
    Operation,
    ProjectSpec,
    Scale,
    SetTo,
    Site,
)
from tests.architectures.cases import LATENT_WIDTHS, Case
from tests.architectures.test_levels import ALTUP, HEADS, HYPER, graphs, served, side_by_side
from tests.architectures.tiny_models import plain

DEEPSEEK_V4 = Case(
    "deepseek_v4",
    "three streams",
    LATENT_WIDTHS
    | {
        "hc_mult": 3,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "qk_rope_head_dim": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
)
QWEN4 = Case(
    "qwen4_exp_text",
    "two streams",
    HEADS
    | {
        "hc_count": 2,
        "hc_lowrank": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
)
MODERNBERT = Case(
    "modernbert-decoder",
    "hidden layer",
    {"classifier_bias": True, "norm_bias": True, "decoder_bias": True, "pad_token_id": 0},
)
SEVERAL = (ALTUP, HYPER, DEEPSEEK_V4, QWEN4)
every_case = pytest.mark.parametrize("case", [*SEVERAL, MODERNBERT], ids=lambda case: case.id)
several = pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.id)


def blocks_of(case: Case) -> Any:
    return plain(case).model.layers


def logits_of(case: Case) -> Tensor:
    with torch.no_grad():
        found: Tensor = plain(case)(torch.tensor([case.prompt]), use_cache=False).logits[0]
    return found


@every_case
def test_lens_of_a_layer_is_the_plain_model_that_ends_there(case: Case) -> None:
    blocks = blocks_of(case)
    _, found = graphs(case, include_vectors=True)
    for graph in found:
        assert graph.vectors is not None
        plain(case).model.layers = blocks[: graph.layer + 1]
        try:
            expected = logits_of(case)
        finally:
            plain(case).model.layers = blocks
        head = served(case).view.lens
        for node, vector in zip(graph.nodes, graph.vectors, strict=True):
            if node.kind is NodeKind.BLOCK_OUTPUT:
                prepared = head.prepare(torch.from_numpy(vector)[None], LensKind.FINAL_NORM)
                logits = head.cap(head.logits(prepared))[0]
                torch.testing.assert_close(logits, expected[node.position], rtol=1e-4, atol=1e-4)


@every_case
def test_contributions_of_all_layers_add_up_to_the_logits(case: Case) -> None:
    header, found = graphs(case, include_logit_contribution=True)
    logits = logits_of(case)
    added = {target.position: target.constant_logit_contribution for target in header.targets}
    # In layers with all parts, OTHER is a part of what attention or the MLP adds.
    added_kinds = {NodeKind.ATTENTION_OUTPUT, NodeKind.MLP_OUTPUT}
    whole = {NodeKind.BLOCK_INPUT} | (added_kinds if case is MODERNBERT else {NodeKind.OTHER})
    for graph in found:
        by_id = dict(zip(graph.nodes.ids, graph.nodes, strict=True))
        for edge in graph.edges:
            source = by_id.get(edge.source)
            if source is not None and source.kind in whole and edge.logit_contribution is not None:
                added[source.position] += edge.logit_contribution
    for target in header.targets:
        expected = float(logits[target.position, target.target_token_id])
        sums = torch.tensor(added[target.position])
        assert float(served(case).view.lens.cap(sums)) == pytest.approx(expected, abs=1e-4)


@every_case
def test_merge_with_fixed_coefficients_gives_its_own_result(case: Case) -> None:
    merge = served(case).view.lens.merge
    assert isinstance(merge, Merge)
    width = served(case).view.facts.stream_width
    at = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    unit = torch.eye(width // merge.streams)
    result = merge(at)
    constant = merge.constant(at)
    for i, direction in enumerate(unit):
        pulled = merge.pull_back(direction.expand(5, -1), at)
        linear = (pulled * at).sum(-1) + (0 if constant is None else constant[:, i])
        torch.testing.assert_close(linear, result[:, i], rtol=1e-4, atol=1e-5)


@several
def test_gradients_of_the_residual_stream_are_autograds(case: Case) -> None:
    passed: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        whole = output if isinstance(output, Tensor) else output[0]
        whole.retain_grad()
        passed.append(whole)

    embedded: list[Tensor] = []

    def leaf(_module: Any, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    network, length = plain(case), len(case.prompt)
    handles = [block.register_forward_hook(keep) for block in blocks_of(case)]
    handles.append(network.get_input_embeddings().register_forward_hook(leaf))
    try:
        logits = network(torch.tensor([case.prompt]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    logits.max().backward()
    _, found = graphs(case, include_gradients=True)
    seen = 0
    for graph in found:
        assert graph.gradients is not None
        gradient = passed[graph.layer].grad
        assert gradient is not None
        expected = side_by_side(gradient, length).norm(dim=-1)
        for node, norm in zip(graph.nodes, graph.gradients.norms, strict=True):
            if node.kind is NodeKind.BLOCK_OUTPUT:
                seen += 1
                assert norm == pytest.approx(float(expected[node.position]), rel=1e-3, abs=1e-5)
    assert seen == len(passed) * length


@several
@pytest.mark.parametrize("operation", ["set", "add", "scale"])
def test_interventions_change_every_stream(case: Case, operation: str) -> None:
    model = served(case)
    vector = np.linspace(-1, 1, model.view.facts.d_model, dtype=np.float32)
    streams = model.view.facts.n_streams

    def change(_module: Any, _args: Any, output: Any) -> Any:
        whole = output if isinstance(output, Tensor) else output[0]
        flat = side_by_side(whole, len(case.prompt)).clone()
        every = torch.from_numpy(vector).repeat(streams)
        flat[2] = {"set": every, "add": flat[2] + 2 * every, "scale": 3 * flat[2]}[operation]
        if whole.dim() == 4:
            divided = flat.unflatten(-1, (streams, -1))
            first = whole.shape[0] == streams
            new = divided.transpose(0, 1)[:, None] if first else divided[None]
        else:
            new = flat[None]
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = blocks_of(case)[0].register_forward_hook(change)
    try:
        expected = logits_of(case)
    finally:
        handle.remove()
    operations: dict[str, Operation] = {
        "set": SetTo(vector),
        "add": Add(vector, 2.0),
        "scale": Scale(3.0),
    }
    spec = ActivationsSpec(
        tuple(case.prompt),
        (Site.LOGITS,),
        float32=True,
        interventions=(
            InterventionSpec(Site.BLOCK_OUTPUT, operations[operation], layers=(0,), positions=(2,)),
        ),
    )
    (values,) = (
        event
        for event in activations(resolve_activations(model, spec), lambda: None)
        if isinstance(event, SiteValues)
    )
    found = torch.from_numpy(values.data.view(np.float32).reshape(values.shape))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits_of(case), atol=1e-2)


@several
def test_layers_say_how_many_streams_they_have(case: Case) -> None:
    model = served(case)
    streams = model.view.facts.n_streams
    for found in model.view.levels:
        assert found.level is Level.STREAM
        assert found.reason == (
            f"the block mixes {streams} residual streams side by side (hyper-connections or AltUp)"
        )


@several
def test_project_takes_one_stream_or_all(case: Case) -> None:
    model = served(case)
    facts = model.view.facts
    vectors = np.random.default_rng(1).normal(size=(2, facts.stream_width)).astype(np.float32)
    merge = model.view.lens.merge
    assert merge is not None
    merged = merge(torch.from_numpy(vectors)).numpy()
    lens = LensSpec(top_k=3)

    def read(rows: Any) -> Any:
        (table,) = project_vectors(resolve_project(model, ProjectSpec(rows, lens)), lambda: None)
        return table

    whole, one = read(vectors), read(merged)
    np.testing.assert_array_equal(whole.top_ids, one.top_ids)
    with pytest.raises(InvalidRequest, match=f"{facts.d_model} or {facts.stream_width}"):
        read(vectors[:, 1:])


@pytest.mark.parametrize(
    ("case", "reading", "adding"),
    [
        (
            ALTUP,
            ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"],
            ["self_attn.o_proj", "mlp.down_proj", "per_layer_projection"],
        ),
        (
            HYPER,
            ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "mlp.gate_proj"],
            ["self_attn.o_proj", "mlp.down_proj"],
        ),
        (DEEPSEEK_V4, ["self_attn.q_a_proj", "self_attn.kv_proj"], ["self_attn.o_b_proj"]),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_linear_maps_beside_mixed_streams_are_read_in_the_vocabulary(
    case: Case, reading: list[str], adding: list[str]
) -> None:
    for block in served(case).view.blocks:
        sides = {name: found.side for name, found in block.maps.items()}
        assert {sides[name] for name in reading} == {Side.INPUT}
        assert {sides[name] for name in adding} == {Side.VJP}


def test_streams_that_are_merged_in_an_unknown_way_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{stream.__name__}.find_merge", lambda _modules: None)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(HYPER.config()).eval()
    with pytest.raises(ModelFailed, match=r"layers: the model merges its 2 residual streams in an"):
        view_of(network)

"""Compare the automatic adapter with the others; test families without an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from januslens_server.models.adapters import ADAPTERS, automatic
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_gradient_lens, resolve_trace
from januslens_server.pipelines.self_check import self_check
from januslens_server.pipelines.trace import trace
from januslens_server.results import NAMED_KINDS, GradientMatrix, LayerGraph
from januslens_server.specs import GradientLensSpec, NegativeLogLikelihood, TraceSpec
from tests.architectures.cases import CASES, GEMMA4, LATENT, LLAMA4, WITHOUT_ADAPTER, Case
from tests.architectures.tiny_models import plain, resident

# What the automatic adapter requires, according to its errors: separate maps, one rotation, norms
# with weights.
READABLE = {
    "cohere",
    "gemma",
    "gemma2",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
}
readable = [case for case in CASES if case.family in READABLE and case.name != "grouped, norms"]


def read_automatically(case: Case) -> ResidentModel:
    model = resident(case)
    return replace(model, view=automatic.view(model.network))


def graphs(model: ResidentModel, case: Case) -> Iterator[LayerGraph]:
    spec = TraceSpec(tuple(case.prompt), include_vectors=True, include_logit_contribution=True)
    for event in trace(resolve_trace(model, spec), lambda: None):
        if isinstance(event, LayerGraph):
            yield event


@pytest.mark.parametrize("case", readable, ids=lambda case: case.id)
def test_automatic_view_equals_the_adapters_view(case: Case) -> None:
    written, found = graphs(resident(case), case), graphs(read_automatically(case), case)
    for one, other in zip(written, found, strict=True):
        assert one.nodes == other.nodes
        assert one.vectors is not None
        assert other.vectors is not None
        np.testing.assert_allclose(one.vectors, other.vectors, rtol=1e-5, atol=1e-5)
        for edge, twin in zip(one.edges, other.edges, strict=True):
            assert (edge.source, edge.target, edge.kind) == (twin.source, twin.target, twin.kind)
            assert edge.attention == pytest.approx(twin.attention, abs=1e-6)
            assert edge.logit_contribution == pytest.approx(twin.logit_contribution, abs=1e-5)


def test_a_soft_cap_of_scores_is_not_left_to_sdpa() -> None:
    """transformers 5.17 chooses SDPA for this model, which ignores the cap without a word there."""
    network = plain(next(case for case in WITHOUT_ADAPTER if case.family == "vaultgemma"))
    network.config._attn_implementation = "sdpa"
    automatic.view(network)
    assert network.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "case", WITHOUT_ADAPTER + LATENT + LLAMA4 + GEMMA4, ids=lambda case: case.id
)
def test_family_without_an_adapter_is_mapped_exactly(case: Case) -> None:
    assert case.family not in ADAPTERS
    model = resident(case)
    guarantees = self_check(model)
    assert all(guarantee.measured_error < 1e-5 for guarantee in guarantees), guarantees
    network = plain(case)
    network.zero_grad()
    (-network(torch.tensor([case.prompt])).logits[0, -1].log_softmax(-1)[7]).backward()
    dense = {name: p.grad for name, p in network.named_parameters()}
    names = {id(p): name for name, p in model.network.named_parameters()}
    spec = GradientLensSpec(
        tuple(case.prompt),
        NegativeLogLikelihood((7,)),
        matrices=NAMED_KINDS,
        components=0,
        include_factors=True,
    )
    compared = 0
    for event in gradient_lens(resolve_gradient_lens(model, spec), lambda: None):
        if isinstance(event, GradientMatrix):
            matrix = model.view.matrix((event.layer, event.kind, event.expert))
            gradient = matrix.rows_of(dense[names[id(matrix.parameter())]], event.expert)
            parts = event.components
            assert parts.inputs is not None
            assert parts.vjps is not None
            difference = np.linalg.norm(parts.inputs.T @ parts.vjps - gradient.numpy())
            assert difference <= 1e-5 * np.linalg.norm(gradient), (event.layer, event.kind)
            compared += 1
    assert not model.view.limited(range(len(model.view.blocks)))
    assert compared >= sum(len(block.matrices) for block in model.view.blocks)

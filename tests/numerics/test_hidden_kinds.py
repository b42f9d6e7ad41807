"""A trace of some node kinds equals the whole trace without the other kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from januslens_server.graph.attention import HeadRow
from januslens_server.lens.head import LensHead
from januslens_server.models.loader import load
from januslens_server.models.registry import embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines import readings
from januslens_server.pipelines.readings import FlowReader
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import LayerGraph, NodeKind
from januslens_server.specs import Selection, TraceSpec
from tests.architectures.cases import MEASURED
from tests.architectures.tiny_models import resident

SELECTION = Selection(heads=2, memory_values_per_head=2, top_neurons=3, bottom_neurons=2)
SHOWN = [
    *({kind} for kind in NodeKind),
    {NodeKind.BLOCK_INPUT, NodeKind.BLOCK_OUTPUT, NodeKind.MLP_OUTPUT},
    {NodeKind.HEAD_OUTPUT, NodeKind.MEMORY_VALUE},
    {NodeKind.HEAD_QUERY, NodeKind.MEMORY_KEY, NodeKind.MEMORY_VALUE},
    {NodeKind.MLP_VALUE, NodeKind.OTHER, NodeKind.MLP_OUTPUT, NodeKind.MLP_INPUT},
    {NodeKind.ATTENTION_CONCAT, NodeKind.ATTENTION_NEURON, NodeKind.OTHER},
    set(NodeKind) - {NodeKind.HEAD_OUTPUT},
]


@pytest.fixture(scope="module", params=["demo", "llama-grouped", "mixtral-window"])
def model(request: pytest.FixtureRequest) -> ResidentModel:
    if request.param == "demo":
        return load(embedded_source())
    return resident(next(case for case in MEASURED if case.id == request.param))


def spec(kinds: set[NodeKind]) -> TraceSpec:
    return TraceSpec(
        tuple(range(7, 16)),
        positions=(3, 8),
        selection=SELECTION,
        node_kinds=frozenset(kinds),
        include_vectors=True,
        include_logit_contribution=True,
        overlap_k=3,
    )


def contents(model: ResidentModel, kinds: set[NodeKind]) -> tuple[dict[str, Any], list[Any]]:
    """Return vectors and activations by node, and the edges."""
    nodes, edges = dict[str, Any](), list[Any]()
    for event in trace(resolve_trace(model, spec(kinds)), lambda: None):
        if isinstance(event, LayerGraph):
            assert event.vectors is not None
            for i, node in enumerate(event.nodes):
                nodes[node.id] = (node.kind, event.vectors[i], event.activations[i])
            edges += event.edges
    return nodes, edges


@pytest.fixture(scope="module")
def whole(model: ResidentModel) -> tuple[dict[str, Any], list[Any]]:
    return contents(model, set())


@pytest.mark.parametrize(
    "kinds", SHOWN, ids=lambda kinds: "+".join(kind.name for kind in sorted(kinds))[:60]
)
def test_shown_nodes_and_edges_are_those_of_the_whole_trace(
    model: ResidentModel, whole: tuple[dict[str, Any], list[Any]], kinds: set[NodeKind]
) -> None:
    nodes, edges = contents(model, kinds)
    expected = {name: found for name, found in whole[0].items() if found[0] in kinds}
    assert list(nodes) == list(expected)
    for name, (_, vector, activation) in expected.items():
        assert np.array_equal(nodes[name][1], vector)
        assert np.array_equal(nodes[name][2], activation, equal_nan=True)
    between = [edge for edge in whole[1] if edge.source in expected and edge.target in expected]
    assert [edge[:3] for edge in edges] == [edge[:3] for edge in between]
    for found, wanted in zip(edges, between, strict=True):
        numbers = [(a, b) for a, b in zip(found[3:], wanted[3:], strict=True) if b is not None]
        assert all(a == pytest.approx(b, rel=1e-5, abs=1e-6) for a, b in numbers)


@pytest.mark.parametrize("kinds", [set[NodeKind](), {NodeKind.MLP_VALUE, NodeKind.MLP_OUTPUT}])
def test_trace_without_projections_projects_no_node_and_keeps_its_numbers(
    model: ResidentModel, monkeypatch: pytest.MonkeyPatch, kinds: set[NodeKind]
) -> None:
    asked = replace(spec(kinds), include_vectors=False, overlap_k=0)
    read = layers(model, asked)

    def projected(*_arguments: object, **_named: object) -> None:
        raise AssertionError("nodes of a trace without projections were projected")

    monkeypatch.setattr(FlowReader, "_project", projected)
    alone = layers(model, replace(asked, include_projections=False))
    for found, expected in zip(alone, read, strict=True):
        assert [node.id for node in found.nodes] == [node.id for node in expected.nodes]
        assert (found.rows == -1).all()
        np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5)
        assert np.array_equal(found.activations, expected.activations, equal_nan=True)
        assert found.edges == expected.edges


def layers(model: ResidentModel, asked: TraceSpec) -> list[LayerGraph]:
    events = trace(resolve_trace(model, asked), lambda: None)
    return [event for event in events if isinstance(event, LayerGraph)]


def test_residual_stream_alone_needs_no_attention_parts(
    model: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(_row: HeadRow) -> torch.Tensor:
        raise AssertionError("the heads of a hidden kind were computed")

    for name in ("matching", "values", "pattern"):
        monkeypatch.setattr(HeadRow, name, property(computed))
    nodes, _ = contents(model, {NodeKind.BLOCK_OUTPUT, NodeKind.MLP_VALUE})
    assert nodes


def test_layers_with_few_nodes_are_projected_in_one_product(
    model: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.rows.usable  # it multiplies some rows when it is made
    products: list[int] = []
    logits = LensHead.logits

    def counted(head: LensHead, prepared: torch.Tensor, out: Any = None) -> torch.Tensor:
        products.append(len(prepared))
        return logits(head, prepared, out)

    monkeypatch.setattr(LensHead, "logits", counted)
    few = replace(spec({NodeKind.BLOCK_OUTPUT}), positions=(8,), overlap_k=0)
    found = [layer for layer in layers(model, few) if len(layer.nodes)]
    # The target, and the outputs of all layers. The final norm is not shown.
    assert [rows for rows in products if rows] == [1, len(found)]
    head = model.view.lens
    every = torch.arange(head.unembedding.vocab)
    for layer in found:
        assert layer.vectors is not None
        (normed,) = head.final_norm(torch.from_numpy(layer.vectors))
        plain = (head.unembedding.rows(every) @ normed).sort(descending=True, stable=True)
        (ids,), (read,) = layer.projections.top_ids, layer.projections.top_logits
        assert plain.indices[: len(ids)].tolist() == ids.tolist()
        np.testing.assert_allclose(read, plain.values[: len(ids)], rtol=1e-4, atol=1e-5)


def test_layers_are_sent_when_enough_of_them_are_projected(
    model: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(spec({NodeKind.BLOCK_OUTPUT}), include_gradients=True)
    together = list(trace(resolve_trace(model, asked), lambda: None))
    monkeypatch.setattr(readings, "NODES_TOGETHER", 1)
    alone = list(trace(resolve_trace(model, asked), lambda: None))
    assert None in together
    assert None not in alone
    sent = [[event for event in run if isinstance(event, LayerGraph)] for run in (together, alone)]
    for one, other in zip(*sent, strict=True):
        assert (one.layer, one.last) == (other.layer, other.last)
        assert one.nodes == other.nodes
        assert one.edges == other.edges
        if not len(one.nodes):  # the final norm and the prediction are not shown
            continue
        assert one.gradients is not None
        assert other.gradients is not None
        for table, single in (
            (one.projections, other.projections),
            (one.gradients.projections, other.gradients.projections),
        ):
            assert np.array_equal(table.top_ids, single.top_ids)
            np.testing.assert_allclose(table.top_logits, single.top_logits, rtol=1e-4, atol=1e-5)
        assert np.array_equal(one.gradients.rows, other.gradients.rows)

"""A trace of named heads and neurons has the figures of the whole trace."""

from __future__ import annotations

import pytest

from januslens_server.errors import InvalidRequest
from januslens_server.models.loader import load
from januslens_server.models.registry import embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.results import NodeKind
from januslens_server.specs import HeadSource, Selection, TraceSpec, Unit
from tests.architectures.cases import MEASURED
from tests.architectures.tiny_models import resident
from tests.reference.traces import Traced, run_trace

IDS = tuple(range(7, 16))
EVERYTHING = Selection(heads=0, memory_values_per_head=0, top_neurons=0, bottom_neurons=0)


@pytest.fixture(scope="module", params=["demo", "llama-grouped", "mixtral-window"])
def model(request: pytest.FixtureRequest) -> ResidentModel:
    if request.param == "demo":
        return load(embedded_source())
    return resident(next(case for case in MEASURED if case.id == request.param))


def traced(model: ResidentModel, selection: Selection) -> Traced:
    spec = TraceSpec(IDS, selection=selection, include_logit_contribution=True)
    return run_trace(model, spec)


def sums(found: Traced, ending: str) -> float:
    """Return the logit contributions of all parts of the sums whose ids end so."""
    return sum(
        edge.logit_contribution or 0.0
        for edge in found.edges.values()
        if edge.target.endswith(ending)
    )


def test_named_heads_and_neurons_have_the_figures_of_the_whole_trace(model: ResidentModel) -> None:
    whole = traced(model, EVERYTHING)
    values = [found.node for found in whole.nodes.values() if found.node.kind is NodeKind.MLP_VALUE]
    last, at = model.view.facts.n_layers - 1, len(IDS) - 1
    neurons = [node for node in values if node.layer == 0][5:7]
    named = Selection(  # layer 0 has no heads, and the last layer no neurons
        only_heads=(Unit(-1, 1), Unit(-1, 0), Unit(-1, 1)),
        only_neurons=tuple(Unit(0, node.neuron or 0, node.expert) for node in neurons),
    )
    found = traced(model, named)
    assert found.header.layers == (0, last)
    heads = {f"L{last}/p{at}/HEAD_OUTPUT/h{head}" for head in (0, 1)}
    kinds = (NodeKind.HEAD_OUTPUT, NodeKind.MLP_VALUE)
    shown = {i for i, each in found.nodes.items() if each.node.kind in kinds}
    assert shown == heads | {node.id for node in neurons}
    for key, edge in found.edges.items():
        if edge.source in shown:
            assert edge.logit_contribution == pytest.approx(
                whole.edges[key].logit_contribution, abs=1e-6
            )
    # What is not named is in OTHER, so sums of contributions are those of the whole trace.
    for layer in (0, last):
        for ending in (f"L{layer}/p{at}/ATTENTION_CONCAT", f"L{layer}/p{at}/MLP_OUTPUT"):
            assert sums(found, ending) == pytest.approx(sums(whole, ending), abs=1e-4)


def test_named_sources_have_the_figures_of_the_whole_trace(model: ResidentModel) -> None:
    whole = traced(model, EVERYTHING)
    last, at = model.view.facts.n_layers - 1, len(IDS) - 1
    named = Selection(
        only_heads=(Unit(last, 2),),  # without a source, so all of its sources are in OTHER
        only_sources=(
            HeadSource(-1, 1, -1),
            HeadSource(-1, 0, at - 2),
            HeadSource(-1, 1, at - 1),
            HeadSource(-1, 1, -1),
        ),
    )
    found = traced(model, named)
    assert found.header.layers == (last,)
    place = f"L{last}/p{at}"
    sources = {f"h0/s{at - 2}", f"h1/s{at}", f"h1/s{at - 1}"}
    kinds = (NodeKind.MEMORY_KEY, NodeKind.MEMORY_VALUE)
    shown = {i for i, each in found.nodes.items() if each.node.kind in kinds}
    assert shown == {f"{place}/{kind.name}/{source}" for kind in kinds for source in sources}
    heads = {i for i, each in found.nodes.items() if each.node.kind is NodeKind.HEAD_OUTPUT}
    assert heads == {f"{place}/HEAD_OUTPUT/h{head}" for head in (0, 1, 2)}
    for key, edge in found.edges.items():
        if edge.source in shown:
            expected = whole.edges[key]
            assert edge.attention == pytest.approx(expected.attention, abs=1e-6)
            assert edge.logit_contribution == pytest.approx(expected.logit_contribution, abs=1e-6)
            assert edge.share == pytest.approx(expected.share, abs=1e-5)
    for node_id in shown:
        norm = whole.nodes[node_id].norm
        assert found.nodes[node_id].norm == pytest.approx(norm, rel=1e-5)
    for head in (0, 1, 2):
        ending = f"{place}/HEAD_OUTPUT/h{head}"
        assert sums(found, ending) == pytest.approx(sums(whole, ending), abs=1e-5)


def test_named_source_that_a_position_cannot_attend_to_has_no_node(model: ResidentModel) -> None:
    selection = Selection(only_sources=(HeadSource(0, 1, 3),))
    found = run_trace(model, TraceSpec(IDS, positions=(2, 3), selection=selection))
    values = [i for i, each in found.nodes.items() if each.node.kind is NodeKind.MEMORY_VALUE]
    assert values == ["L0/p3/MEMORY_VALUE/h1/s3"]


@pytest.mark.parametrize(
    ("selection", "field"),
    [
        (Selection(only_heads=(Unit(0, 0), Unit(99, 0))), "selection.only_heads[1].layer"),
        (Selection(only_heads=(Unit(0, 9_999),)), "selection.only_heads[0].number"),
        (Selection(only_heads=(Unit(0, 0, 0),)), "selection.only_heads[0].expert"),
        (Selection(only_neurons=(Unit(0, 99_999, 0),)), "selection.only_neurons[0].number"),
        (Selection(only_neurons=(Unit(0, 0, 99),)), "selection.only_neurons[0].expert"),
        (Selection(only_sources=(HeadSource(99, 0, 0),)), "selection.only_sources[0].layer"),
        (Selection(only_sources=(HeadSource(0, 9_999, 0),)), "selection.only_sources[0].head"),
        (Selection(only_sources=(HeadSource(0, 0, 9),)), "selection.only_sources[0].position"),
        (Selection(only_sources=(HeadSource(0, 0, -10),)), "selection.only_sources[0].position"),
    ],
)
def test_parts_that_the_model_or_the_prompt_lacks_are_refused(
    selection: Selection, field: str, model: ResidentModel
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve_trace(model, TraceSpec(IDS, selection=selection))
    assert refused.value.violations[0].field == field


def test_neuron_without_an_expert_is_refused_in_a_mixture(model: ResidentModel) -> None:
    spec = TraceSpec(IDS, selection=Selection(only_neurons=(Unit(0, 0),)))
    if not model.view.facts.n_experts:
        assert resolve_trace(model, spec).layers == (0,)
        return
    with pytest.raises(InvalidRequest, match="no expert given; expected 0 to"):
        resolve_trace(model, spec)

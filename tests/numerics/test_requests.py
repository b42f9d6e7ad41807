"""Equal requests return equal results; the order of every stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from januslens_server.errors import InvalidRequest
from januslens_server.results import LayerGraph, NodeKind
from januslens_server.specs import LensSpec, Selection, TraceSpec
from tests.reference.examples import CONTEXT, EXAMPLES, LoadExample, prompt
from tests.reference.traces import Traced, run_trace
from tests.support.results import same

LENGTH = 8
SMALL = Selection(heads=2, memory_values_per_head=2, top_neurons=3, bottom_neurons=2)


def spec_of(ids: Sequence[int], **changes: Any) -> TraceSpec:
    spec = TraceSpec(
        tuple(ids), selection=SMALL, include_vectors=True, include_logit_contribution=True
    )
    return replace(spec, **changes)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_repeated_request_gives_the_same_records(name: str, load_example: LoadExample) -> None:
    resident = load_example(name).resident
    spec = spec_of(prompt(name, LENGTH), positions=(0, 3, -1), overlap_k=10)
    first = run_trace(resident, spec)
    run_trace(resident, spec_of(prompt(name, 5)))
    assert same(first.events, run_trace(resident, spec).events)


def test_comparison_detects_a_difference(load_example: LoadExample) -> None:
    resident = load_example("gpt2").resident
    spec = spec_of(prompt("gpt2", LENGTH))
    first, second = (run_trace(resident, replace(spec, target=(token,))).events for token in (7, 8))
    assert not same(first, second)


@pytest.mark.parametrize("name", EXAMPLES)
def test_positions_name_the_same_nodes_however_asked(name: str, load_example: LoadExample) -> None:
    """For 0, -1 and all, ids are equal, and so are vectors, up to the order of float32 sums."""
    resident, ids = load_example(name).resident, prompt(name, LENGTH)
    everywhere = run_trace(resident, spec_of(ids, all_positions=True))
    for asked, position in ((-1, LENGTH - 1), (-LENGTH, 0), (4, 4)):
        alone = run_trace(resident, spec_of(ids, positions=(asked,)))
        wanted = {i for i, found in everywhere.nodes.items() if found.node.position == position}
        assert alone.nodes.keys() == wanted
        for node_id in wanted:
            there, here = everywhere.vector(node_id), alone.vector(node_id)
            assert (there - here).norm() <= 1e-6 * max(float(there.norm()), 1e-30)
        assert alone.edges.keys() == {
            key for key in everywhere.edges if key[0] in wanted and key[1] in wanted
        }


def test_positions_are_sent_once_and_ascending(load_example: LoadExample) -> None:
    resident, ids = load_example("gpt2").resident, prompt("gpt2", LENGTH)
    found = run_trace(resident, spec_of(ids, positions=(-1, 2, LENGTH - 1, 0)))
    assert [target.position for target in found.header.targets] == [0, 2, LENGTH - 1]
    assert [t.position for t in run_trace(resident, spec_of(ids)).header.targets] == [LENGTH - 1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_prompt_beyond_the_context_is_refused(name: str, load_example: LoadExample) -> None:
    resident = load_example(name).resident
    with pytest.raises(InvalidRequest, match=f"at most {CONTEXT}"):
        run_trace(resident, spec_of(prompt(name, CONTEXT + 1)))


@pytest.mark.parametrize("layers", [(), (0, 2)])
@pytest.mark.parametrize("name", ["gptj", "llama_grouped"])
def test_edges_refer_to_what_was_sent(
    name: str, layers: tuple[int, ...], load_example: LoadExample
) -> None:
    resident, ids = load_example(name).resident, prompt(name, CONTEXT)
    found = run_trace(resident, spec_of(ids, all_positions=True, layers=layers))
    sent: set[str] = set()
    for graph in found.graphs:
        sent |= {node.id for node in graph.nodes}
        assert {end for edge in graph.edges for end in (edge.source, edge.target)} <= sent
    assert_layers_are_closed_once(found)


def assert_layers_are_closed_once(found: Traced) -> None:
    layers = [graph.layer for graph in found.graphs]
    assert layers == sorted(layers)
    assert set(layers) == set(found.header.layers)
    for graph, following in zip(found.graphs, [*found.graphs[1:], None], strict=True):
        assert graph.last == (following is None or following.layer != graph.layer)


SHOWN = frozenset({NodeKind.HEAD_OUTPUT, NodeKind.ATTENTION_CONCAT, NodeKind.BLOCK_OUTPUT})


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama_grouped"])
def test_node_kinds_hide_nodes_without_changing_others(
    name: str, load_example: LoadExample
) -> None:
    resident, ids = load_example(name).resident, prompt(name, LENGTH)
    asked = spec_of(ids, positions=(0, 3, -1), overlap_k=5)
    whole = run_trace(resident, asked)
    part = run_trace(resident, replace(asked, node_kinds=SHOWN))
    kept = {i: found for i, found in whole.nodes.items() if found.node.kind in SHOWN}
    assert part.nodes.keys() == kept.keys()
    for node_id, found in part.nodes.items():
        assert same(found.vector, kept[node_id].vector)
        assert (found.row is None) == (kept[node_id].row is None)
    visible = {key: e for key, e in whole.edges.items() if key[0] in kept and key[1] in kept}
    assert part.edges == visible


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("name", EXAMPLES)
def test_overlap_is_the_share_of_common_tokens(
    name: str, k: int, load_example: LoadExample
) -> None:
    resident, ids = load_example(name).resident, prompt(name, LENGTH)
    spec = spec_of(ids, positions=(0, -1), overlap_k=k, lens=LensSpec(top_k=k, bottom_k=0))
    found = run_trace(resident, spec)
    scored = 0
    for edge in found.edges.values():
        rows = [found.nodes[end].row for end in (edge.source, edge.target)]
        if None in rows:
            assert edge.overlap is None
            continue
        source, target = ({*found.table.top_ids[row].tolist()} for row in rows)
        assert edge.overlap == len(source & target) / k
        scored += 1
    assert scored > len(found.header.layers) * 10


def test_overlap_does_not_lengthen_the_token_lists(load_example: LoadExample) -> None:
    resident, ids = load_example("gpt2").resident, prompt("gpt2", LENGTH)
    found = run_trace(resident, spec_of(ids, overlap_k=9, lens=LensSpec(top_k=2, bottom_k=1)))
    assert found.table.top_ids.shape[1] == 2
    assert {edge.overlap is None for edge in found.edges.values()} == {True, False}
    unasked = run_trace(resident, spec_of(ids))
    assert all(edge.overlap is None for edge in unasked.edges.values())


def test_unrequested_fields_are_not_sent(load_example: LoadExample) -> None:
    found = run_trace(load_example("gpt2").resident, TraceSpec(tuple(prompt("gpt2", LENGTH))))
    assert all(graph.vectors is None for graph in found.graphs)
    assert all(edge.logit_contribution is None for edge in found.edges.values())
    assert found.summary.constant_logit_contribution is None
    assert isinstance(found.events[1], LayerGraph)


@pytest.mark.parametrize("name", ["gpt2", "llama_grouped"])
def test_targets_of_positions_are_the_next_tokens_or_those_named(
    name: str, load_example: LoadExample
) -> None:
    loaded, ids = load_example(name), prompt(name, 6)
    spec = TraceSpec(
        tuple(ids),
        target=(11,),
        all_positions=True,
        next_token_targets=True,
        targets_at=((-4, (33,)),),
        include_logit_contribution=True,
    )
    with torch.inference_mode():
        logits = loaded.network(torch.tensor([ids])).logits[0].double()
    found = run_trace(loaded.resident, spec)
    expected = [*ids[1:], 11]
    expected[2] = 33
    for target, token, row in zip(found.header.targets, expected, logits, strict=True):
        assert target.target_token_id == token
        assert target.predicted_token_id == int(row.argmax())
        assert target.target_rank == int((row > row[token]).sum())
        assert target.target_logit == pytest.approx(float(row[token]), abs=1e-4)
        assert target.target_log_probability == pytest.approx(
            float(row.log_softmax(0)[token]), abs=1e-4
        )
    last = loaded.resident.view.facts.n_layers - 1
    read = [found.nodes[f"L{last}/p{at}/BLOCK_OUTPUT"].row for at in range(len(ids))]
    ranks = [found.table.target_ranks[row, 0] for row in read if row is not None]
    assert ranks == [target.target_rank for target in found.header.targets]


def test_a_target_given_twice_is_refused(load_example: LoadExample) -> None:
    spec = TraceSpec((1, 2, 3), targets_at=((-1, (5,)), (2, (6,))))
    with pytest.raises(InvalidRequest, match="position 2 is given twice") as refused:
        run_trace(load_example("gpt2").resident, spec)
    assert refused.value.violations[0].field == "targets_at[1].position"

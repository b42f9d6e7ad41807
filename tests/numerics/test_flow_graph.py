"""Compare every node and edge of a trace with the float64 reference, for every example."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from januslens_server.results import EdgeKind, NodeKind
from januslens_server.specs import Selection, TraceSpec
from tests.reference.examples import CONTEXT, EXAMPLES, Loaded, LoadExample, prompt
from tests.reference.graph import PromptOracle, expected_graph
from tests.reference.traces import GraphErrors, Traced, run_trace

SMALL = Selection(heads=2, memory_values_per_head=2, top_neurons=3, bottom_neurons=2)
LARGER = replace(SMALL, memory_values_per_head=3, top_neurons=4)  # the same heads
EVERYTHING = Selection(heads=0, memory_values_per_head=0, top_neurons=0, bottom_neurons=0)
LENGTH = 8
EVERYWHERE, ENDS, LAST = tuple(range(LENGTH)), (0, LENGTH - 1), (LENGTH - 1,)
PLACES = [
    pytest.param(SMALL, EVERYWHERE, id="small-everywhere"),
    pytest.param(Selection(), ENDS, id="default-ends"),
    pytest.param(EVERYTHING, LAST, id="everything-last"),
]
SHARE_SUM = 1e-4


def traced(
    loaded: Loaded,
    ids: Sequence[int],
    selection: Selection = SMALL,
    positions: Sequence[int] = (),
    layers: Sequence[int] = (),
) -> Traced:
    spec = TraceSpec(
        tuple(ids),
        layers=tuple(layers),
        positions=tuple(positions),
        selection=selection,
        include_vectors=True,
        include_logit_contribution=True,
    )
    return run_trace(loaded.resident, spec)


TraceExample = Callable[[str, Selection, tuple[int, ...]], Traced]


@pytest.fixture(scope="module")
def trace_example(load_example: LoadExample) -> TraceExample:
    """Trace an example's prompt, once for all tests."""

    @cache
    def run(name: str, selection: Selection, positions: tuple[int, ...]) -> Traced:
        return traced(load_example(name), prompt(name, LENGTH), selection, positions)

    return run


def check(found: Traced, oracle: PromptOracle, selection: Selection) -> None:
    """Compare everything in the trace with the reference."""
    positions = [target.position for target in found.header.targets]
    expected = expected_graph(oracle, found.header.layers, positions, selection)
    errors = GraphErrors()
    errors.add(found, expected)
    # In float32; a sum of many left-out parts may cancel, so its vector is the least exact.
    assert errors.vector <= 3e-5
    assert errors.norm <= 1e-5
    assert errors.activation <= 2e-5
    assert errors.weight <= 2e-5
    assert errors.share <= 1e-5
    assert errors.attention <= 1e-5
    assert errors.contribution <= 1e-5
    assert (found.summary.nodes, found.summary.edges) == (errors.nodes, errors.edges)


@pytest.mark.parametrize(("selection", "positions"), PLACES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_graph_equals_the_reference(
    name: str,
    selection: Selection,
    positions: tuple[int, ...],
    load_example: LoadExample,
    trace_example: TraceExample,
) -> None:
    oracle = PromptOracle(load_example(name).reference, prompt(name, LENGTH))
    check(trace_example(name, selection, positions), oracle, selection)


@pytest.mark.parametrize(("selection", "positions"), PLACES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_shares_add_up(
    name: str, selection: Selection, positions: tuple[int, ...], trace_example: TraceExample
) -> None:
    """This holds for every sum, OTHER included; a sum of zero has no shares."""
    found = trace_example(name, selection, positions)
    totals: defaultdict[str, float] = defaultdict(float)
    sums = set()
    for edge in found.edges.values():
        if edge.kind is EdgeKind.PART:
            sums.add(edge.target)
            if edge.share is not None:
                totals[edge.target] += edge.share
    assert all(abs(total - 1) <= SHARE_SUM for total in totals.values())
    assert {node_id for node_id in sums if found.nodes[node_id].norm} == totals.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_parts_add_up_to_the_block(name: str, trace_example: TraceExample) -> None:
    """The block's input, attention's output and the MLP's output add up to the block's output."""
    found = trace_example(name, SMALL, EVERYWHERE)
    for position in range(LENGTH):
        source = f"p{position}/BLOCK_INPUT"
        for layer in found.header.layers:
            block = f"L{layer}/p{position}"
            terms = (source, f"{block}/ATTENTION_OUTPUT", f"{block}/MLP_OUTPUT")
            total = torch.stack([found.vector(term) for term in terms]).sum(0)
            output = found.vector(f"{block}/BLOCK_OUTPUT")
            assert (total - output).norm() <= 1e-6 * output.norm()
            source = f"{block}/BLOCK_OUTPUT"


@pytest.mark.parametrize("name", EXAMPLES)
def test_contributions_add_up_to_the_logit(
    name: str, load_example: LoadExample, trace_example: TraceExample
) -> None:
    loaded, ids = load_example(name), prompt(name, LENGTH)
    with torch.no_grad():
        logits = loaded.network(input_ids=torch.tensor([ids])).logits[0]
    found = trace_example(name, SMALL, EVERYWHERE)
    terms = {NodeKind.BLOCK_INPUT, NodeKind.ATTENTION_OUTPUT, NodeKind.MLP_OUTPUT}
    for target in found.header.targets:
        total = target.constant_logit_contribution
        for edge in found.edges.values():
            node = found.nodes[edge.source].node
            is_term = edge.kind is EdgeKind.PART and node.kind in terms
            if is_term and node.position == target.position:
                assert edge.logit_contribution is not None
                total += edge.logit_contribution
        logit = float(logits[target.position, target.target_token_id])
        assert total == pytest.approx(logit, abs=2e-5)
        assert target.target_logit == pytest.approx(logit, abs=2e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_parts_refine_the_contribution_of_their_sum(name: str, trace_example: TraceExample) -> None:
    found = trace_example(name, SMALL, EVERYWHERE)
    into: defaultdict[str, float] = defaultdict(float)
    for edge in found.edges.values():
        into[edge.target] += edge.logit_contribution or 0.0
    refined = {NodeKind.HEAD_OUTPUT, NodeKind.ATTENTION_OUTPUT, NodeKind.MLP_OUTPUT}
    checked = 0
    for edge in found.edges.values():
        if edge.kind is EdgeKind.PART and found.nodes[edge.source].node.kind in refined:
            assert into[edge.source] == pytest.approx(edge.logit_contribution, abs=2e-5)
            checked += 1
    assert checked >= 4 * len(found.header.layers) * LENGTH


@pytest.mark.parametrize("name", EXAMPLES)
def test_attention_is_eager_attention(name: str, load_example: LoadExample) -> None:
    """The server recomputes the rows; eager attention returns its own."""
    loaded, ids = load_example(name), prompt(name, LENGTH)
    with torch.no_grad():
        out = loaded.network(input_ids=torch.tensor([ids]), output_attentions=True)
    spec = TraceSpec(tuple(ids), all_positions=True, selection=Selection(0, 0, 1, 0))
    found = run_trace(loaded.resident, spec)
    attended = torch.zeros(len(out.attentions), *out.attentions[0].shape[1:])
    for edge in found.edges.values():
        node = found.nodes[edge.target].node
        if node.kind is NodeKind.MEMORY_KEY:
            assert edge.attention is not None
            assert edge.attention == edge.weight
            attended[node.layer, node.head, node.position, node.source_position] = edge.attention
    torch.testing.assert_close(
        attended, torch.cat(out.attentions).reshape(attended.shape), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_other_exists_only_if_parts_are_left_out(name: str, trace_example: TraceExample) -> None:
    everything = trace_example(name, EVERYTHING, LAST)
    assert not [i for i, found in everything.nodes.items() if found.node.kind is NodeKind.OTHER]
    small = trace_example(name, SMALL, EVERYWHERE)
    left = {i for i, found in small.nodes.items() if found.node.kind is NodeKind.OTHER}
    # The first position attends only to itself, so its heads leave nothing out.
    assert not [i for i in left if "/p0/OTHER/HEAD_OUTPUT" in i]
    assert [i for i in left if f"/p{LENGTH - 1}/OTHER/HEAD_OUTPUT" in i]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "llama_grouped"])
def test_other_counts_and_identifies_its_members(name: str, trace_example: TraceExample) -> None:
    whole = parts_of_sums(trace_example(name, EVERYTHING, LAST))
    traces = [trace_example(name, selection, LAST) for selection in (SMALL, LARGER)]
    members, left = [], []
    for found in traces:
        sums = parts_of_sums(found)
        others = {
            edge.source: edge.target for edge in found.edges.values() if "/OTHER/" in edge.source
        }
        left.append({other: whole[total] - sums[total] for other, total in others.items()})
        members.append({other: found.nodes[other].node.members for other in others})
        for other, parts in left[-1].items():
            known = members[-1][other]
            assert known is not None
            assert known.count == len(parts) > 0
    both = left[0].keys() & left[1].keys()
    same = {other for other in both if left[0][other] == left[1][other]}
    assert 0 < len(same) < len(both)
    assert same == {other for other in both if members[0][other] == members[1][other]}


def parts_of_sums(found: Traced) -> dict[str, set[str]]:
    """Return the parts of each sum that may be left out: sources, heads, rows and neurons."""
    sums: dict[str, set[str]] = defaultdict(set)
    for edge in found.edges.values():
        if edge.kind is EdgeKind.PART and not re.search("/OTHER/|_BIAS", edge.source):
            sums[edge.target].add(edge.source)
    return sums


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("length", [1, CONTEXT])
def test_shortest_and_longest_prompts(name: str, length: int, load_example: LoadExample) -> None:
    loaded, ids = load_example(name), prompt(name, length)
    check(traced(loaded, ids), PromptOracle(loaded.reference, ids), SMALL)


@pytest.mark.parametrize("name", EXAMPLES)
def test_results_do_not_depend_on_earlier_prompts(name: str, load_example: LoadExample) -> None:
    loaded = load_example(name)
    for length in (6, 3):
        ids = prompt(name, length)
        check(traced(loaded, ids), PromptOracle(loaded.reference, ids), SMALL)


@pytest.mark.parametrize("layers", [(0, 2), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama_grouped"])
def test_layers_that_are_not_neighbours(
    name: str, layers: tuple[int, ...], load_example: LoadExample
) -> None:
    loaded, ids = load_example(name), prompt(name, LENGTH)
    found = traced(loaded, ids, layers=layers, positions=[3, 6])
    check(found, PromptOracle(loaded.reference, ids), SMALL)
    gaps = [edge for edge in found.edges.values() if edge.kind is EdgeKind.GAP]
    assert len(gaps) == (2 if layers == (0, 2) else 0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_contributions_refer_to_the_requested_target(name: str, load_example: LoadExample) -> None:
    loaded, ids, target = load_example(name), prompt(name, LENGTH), 7
    spec = TraceSpec(tuple(ids), target=(target,), selection=SMALL, include_logit_contribution=True)
    found = run_trace(loaded.resident, spec)
    last = LENGTH - 1
    oracle = PromptOracle(loaded.reference, ids, {last: target})
    errors = GraphErrors()
    errors.add(found, expected_graph(oracle, found.header.layers, [last], SMALL))
    assert errors.contribution <= 1e-5
    assert found.summary.constant_logit_contribution == pytest.approx(
        oracle.constant(last), abs=1e-5
    )

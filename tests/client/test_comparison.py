"""Compare traces of the demo; the expected figures are those of the two traces themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from januslens import Client, Trace, read_trace

JAPAN = "The capital of Japan is the city of"
PERU = "The capital of Peru is the city of"
LONGER = "Yes. The capital of Japan is the city of"


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[Client]:
    with Client(server_address) as client:
        yield client


@pytest.fixture(scope="module")
def japan(client: Client) -> Trace:
    return client.trace(JAPAN, " Tokyo", layers=[0, 3])


@pytest.fixture(scope="module")
def peru(client: Client) -> Trace:
    return client.trace(PERU, " Tokyo", layers=[0, 3])


def test_a_trace_does_not_differ_from_itself(japan: Trace) -> None:
    same = japan.compare(japan)
    assert [node.before.id for node in same.node_list] == [node.id for node in japan.node_list]
    assert len(same.edge_list) == len(japan.edge_list)
    assert (same.only_before, same.only_after) == ((), ())
    assert {node.probability_difference for node in same.node_list} <= {0.0, None}
    assert {edge.contribution_difference for edge in same.edge_list} <= {0.0, None}


def test_differences_are_those_of_the_figures_of_both_traces(japan: Trace, peru: Trace) -> None:
    compared = japan.compare(peru)
    last = japan.nodes_of("BLOCK_OUTPUT")[-1].id
    (pair,) = (node for node in compared.node_list if node.before.id == last)
    before, after = japan.node(last).projection, peru.node(last).projection
    assert before is not None
    assert after is not None
    assert before.target_probability is not None
    assert after.target_probability is not None
    assert pair.probability_difference == after.target_probability - before.target_probability < 0
    assert (pair.top_before, pair.top_after) == (before.top[0].token, after.top[0].token)
    assert pair.norm_ratio == peru.node(last).norm / japan.node(last).norm
    most = compared.changed_contributions()[0]
    assert most.before.source == most.after.source
    assert (most.before.logit_contribution or 0) + (most.contribution_difference or 0) == (
        pytest.approx(most.after.logit_contribution)
    )
    # An OTHER node has the same id in both traces, but not always the same members.
    assert without_others(compared.only_before).isdisjoint(node.id for node in peru.node_list)
    assert without_others(compared.only_after).isdisjoint(node.id for node in japan.node_list)


def without_others(ids: Iterable[str]) -> set[str]:
    return {node_id for node_id in ids if "/OTHER/" not in node_id}


def test_positions_of_a_longer_prompt_are_mapped(client: Client, japan: Trace) -> None:
    longer = client.trace(LONGER, " Tokyo", layers=[0, 3])
    shift = len(longer.prompt_tokens) - len(japan.prompt_tokens)
    with pytest.raises(ValueError, match="tokens; give the positions to compare"):
        japan.compare(longer)
    positions = {p: p + shift for p in range(len(japan.prompt_tokens))}
    compared = japan.compare(longer, positions=positions)
    assert len(compared.node_list) > 50
    for pair in compared.node_list:
        assert pair.before.position is not None
        assert pair.after.position == pair.before.position + shift
        if pair.before.source_position is not None:
            assert pair.after.source_position == pair.before.source_position + shift
        assert (pair.before.kind, pair.before.head, pair.before.neuron) == (
            pair.after.kind,
            pair.after.head,
            pair.after.neuron,
        )
    assert japan.compare(longer, positions={}).node_list == ()


def test_frames_have_the_figures_of_both_traces(japan: Trace, peru: Trace) -> None:
    compared = japan.compare(peru)
    frame = compared.nodes
    for when, trace in (("before", japan), ("after", peru)):
        expected = trace.nodes.loc[frame.index]
        assert (frame[f"norm_{when}"] == expected["norm"]).all()
        assert frame[f"target_rank_{when}"].equals(expected["target_rank"])
        assert frame[f"top_token_{when}"].dropna().tolist() == (
            expected["top_token"].dropna().tolist()
        )
    edges = compared.edges
    assert len(edges) == len(compared.edge_list)
    assert edges["share_after"].dropna().tolist() == (
        [e.after.share for e in compared.edge_list if e.after.share is not None]
    )


def test_notebooks_show_both_prompts_and_the_changed_contributions(
    japan: Trace, peru: Trace
) -> None:
    shown = japan.compare(peru)._repr_html_()
    assert "Japan" in shown
    assert "Peru" in shown
    assert "Contributions that differ most" in shown


def test_shared_positions_are_those_at_the_start_and_at_the_end(
    client: Client, japan: Trace
) -> None:
    longer = client.trace("The capital of Peru is called the city of")
    compared = japan.compare(longer, positions="shared")
    texts = [[token.text for token in trace.prompt_tokens] for trace in (japan, longer)]
    assert texts[0][3] != texts[1][3]
    end = len(texts[1]) - len(texts[0])
    start = {place: place for place in range(3)}
    assert compared.positions == start | {place: place + end for place in range(5, 8)}
    assert japan.compare(japan, positions="shared").positions == {n: n for n in range(8)}


def test_comparisons_print_the_contributions_that_differ_most(japan: Trace, peru: Trace) -> None:
    compared = japan.compare(peru)
    lines = str(compared).splitlines()
    assert lines[0] == "Contributions to the logit of ␣Tokyo that differ most"
    for line, edge in zip(lines[2:-1], compared.changed_contributions(), strict=False):
        before, after, change, node = line.split()
        assert node == edge.before.source
        assert float(before) == pytest.approx(edge.before.logit_contribution, abs=0.006)
        assert float(after) == pytest.approx(edge.after.logit_contribution, abs=0.006)
        assert float(change) == pytest.approx(edge.contribution_difference, abs=0.006)
    assert len(lines) == 13


def test_other_is_compared_only_if_it_sums_the_same_parts(client: Client, japan: Trace) -> None:
    fewer = client.trace(JAPAN, " Tokyo", layers=[0, 3], top_neurons=5)
    compared = japan.compare(fewer)
    others = {node.before.id for node in compared.node_list if node.before.kind == "OTHER"}
    mlp = {node.id for node in japan.nodes_of("OTHER") if node.id.endswith("/MLP_OUTPUT")}
    heads = {node.id for node in japan.nodes_of("OTHER") if "/HEAD_OUTPUT/" in node.id}
    assert mlp
    assert heads
    assert heads <= others
    assert mlp.isdisjoint(others)
    assert mlp <= set(compared.only_before)
    assert mlp <= set(compared.only_after)
    assert mlp.isdisjoint(edge.before.source for edge in compared.edge_list)


def test_frames_tell_sums_of_other_parts_apart(client: Client, japan: Trace) -> None:
    fewer = client.trace(JAPAN, " Tokyo", layers=[0, 3], top_neurons=5)
    joined = japan.nodes.join(fewer.nodes.add_suffix("_fewer"), how="inner")
    others = joined[joined["kind"] == "OTHER"]
    same = others["members_digest"] == others["members_digest_fewer"]
    assert same.tolist() == ["/HEAD_OUTPUT/" in node_id for node_id in others.index]
    rows = others[~same]  # of W_O and FF2, in both layers
    assert (rows["members_fewer"] - rows["members"]).tolist() == [13, 13, 13, 13]
    assert joined.loc[joined["kind"] != "OTHER", "members"].isna().all()


def test_frames_joined_by_id_and_digest_have_the_nodes_of_the_comparison(
    client: Client, japan: Trace
) -> None:
    fewer = client.trace(JAPAN, " Tokyo", layers=[0, 3], top_neurons=5)
    before, after = (trace.nodes.reset_index() for trace in (japan, fewer))
    joined = before.merge(after, on=["id", "members_digest"])
    ids = [node.before.id for node in japan.compare(fewer).node_list]
    assert joined["id"].tolist() == ids
    assert any("/OTHER/" in node_id for node_id in ids)


def test_parts_of_models_with_other_layers_are_not_compared(japan: Trace) -> None:
    text = "\n".join(japan.to_json_lines()).replace('"nLayers": 4', '"nLayers": 6')
    compared = japan.compare(read_trace(text.splitlines()))
    assert japan.compare(japan).different_parts == ""
    assert compared.different_parts == (
        "the models have different parts (GPT2LMHeadModel with 4 layers of 4 heads and "
        "GPT2LMHeadModel with 6 layers of 4 heads); parts with the same name are not compared"
    )
    for shown in (str(compared), compared._repr_html_()):
        assert compared.different_parts in shown
        assert "differ most" not in shown

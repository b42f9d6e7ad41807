"""Test both clients against the real server with the embedded model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import januslens
from januslens import AsyncClient, Client, LayerGraph, Matrix, Trace
from tests.support.server import ServerProcess

PROMPT = "The capital of Japan is the city of"
LAYERS = 4
HEADS = 4


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[Client]:
    with Client(server_address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def trace(client: Client) -> Trace:
    return client.trace(PROMPT)


def test_the_demo_is_ready_and_keeps_its_guarantees(client: Client) -> None:
    (model,) = client.list_models()
    assert (model.name, model.n_layers, model.ready) == ("demo", LAYERS, True)
    assert model.guarantees
    assert all(guarantee.held for guarantee in model.guarantees)


def test_tokens_cover_the_text(client: Client) -> None:
    tokens = client.tokenize(PROMPT)
    assert [token.text for token in tokens][-2:] == [" city", " of"]
    assert b"".join(token.raw for token in tokens).decode() == PROMPT
    assert [PROMPT[token.start : token.end] for token in tokens] == [t.text for t in tokens]


def test_rank_of_tokyo_rises_through_the_layers(trace: Trace) -> None:
    assert trace.target().target.text == " Tokyo"
    outputs = [layer.nodes_of("BLOCK_OUTPUT")[-1].projection for layer in trace.layers]
    probabilities = [read.target_probability or 0.0 for read in outputs if read]
    assert probabilities[0] < 0.01
    assert probabilities[-1] > 0.5
    assert probabilities[-1] == pytest.approx(trace.target().target_probability, abs=1e-5)
    prediction = trace.nodes_of("PREDICTION")[0].projection
    assert prediction is not None
    assert prediction.top_tokens[0].text == " Tokyo"


def test_every_sum_is_the_sum_of_its_parts(trace: Trace) -> None:
    parts = trace.edges[trace.edges["share"].notna()]
    totals = parts.groupby("target")["share"].sum()
    assert len(totals) == LAYERS * (HEADS + 5)  # heads, together, W_O, mid, MLP, block
    np.testing.assert_allclose(totals, 1.0, atol=1e-4)


def test_the_contributions_and_the_constant_are_the_logit(trace: Trace) -> None:
    target = trace.target()
    total = sum(part.logit_contribution or 0.0 for part in trace.contributions())
    expected = pytest.approx(target.target_logit, rel=1e-4)
    assert total + target.constant_logit_contribution == expected


def test_attributions_and_gradients_are_columns_and_order_the_parts(client: Client) -> None:
    trace = client.trace(PROMPT, attribution=True, gradients=True, other=" London", layers=[0, 3])
    assert trace.header.other is not None
    assert trace.header.other.text == " London"
    parts = trace.contributions(by="attribution")
    effects = [part.attribution or 0.0 for part in parts]
    assert effects == sorted(effects, reverse=True)
    assert trace.edges["attribution"].notna().equals(trace.edges["kind"] == "PART")
    state = trace.nodes_of("BLOCK_OUTPUT")[-1]
    assert state.gradient is not None
    assert state.gradient.top
    assert trace.nodes.loc[state.id, "gradient_norm"] == state.gradient_norm
    with pytest.raises(ValueError, match="unknown effect 'share'"):
        trace.contributions(by="share")  # type: ignore[arg-type]


def test_the_strongest_head_reads_the_country(trace: Trace) -> None:
    head = max(trace.heads(), key=lambda part: part.logit_contribution or 0.0)
    source = max(trace.parts_of(head.node), key=lambda p: (p.edge and p.edge.attention) or 0.0)
    position = source.node.source_position
    assert position is not None
    assert trace.prompt_tokens[position].text == " Japan"


def test_contribution_tree_adds_up_to_the_logit_and_reads_the_country(trace: Trace) -> None:
    tree = trace.why()
    assert tree.contribution == pytest.approx(trace.target().target_logit, rel=1e-4)
    for _, node in tree.lines():
        total = sum(part.contribution for part in node.parts) + node.rest
        assert total == pytest.approx(node.contribution, rel=1e-9)
    sources = [node for _, node in tree.lines() if node.node.kind == "MEMORY_VALUE"]
    strongest = max(sources, key=lambda source: source.contribution)
    assert trace.prompt_tokens[strongest.node.source_position or 0].text == " Japan"


def test_every_norm_has_an_effect(trace: Trace) -> None:
    effects = trace.norm_effects()
    assert len(effects) == 2 * LAYERS + 1
    assert all(len(effect.removed) == len(effect.added) for effect in effects)


def test_streamed_result_equals_the_result_of_one_call(client: Client, trace: Trace) -> None:
    with client.stream_trace(PROMPT) as stream:
        events = list(stream)
        result = stream.result()
    layers = [event for event in events if isinstance(event, LayerGraph)]
    assert tuple(layers) == result.layers == trace.layers
    assert [layer.layer for layer in layers] == list(range(LAYERS))
    assert result.prompt_tokens == trace.prompt_tokens
    assert result.targets == trace.targets


def test_some_layers_at_some_positions(client: Client) -> None:
    trace = client.trace(PROMPT, layers=[1, 3], positions=[3, -1])
    assert [layer.layer for layer in trace.layers] == [1, 3]
    assert [target.position for target in trace.targets] == [3, 7]
    assert trace.edges["kind"].eq("GAP").sum() == 2
    tree = trace.why(3)
    assert tree.node.id == "L3/p3/BLOCK_OUTPUT"
    assert "L2/p3/BLOCK_OUTPUT" in [part.node.id for part in trace.why(3, at_most=99).parts]


def test_projected_node_vector_equals_the_traces_projection(client: Client) -> None:
    traced = client.trace(PROMPT, vectors=True, layers=LAYERS - 1)
    node = traced.nodes_of("BLOCK_OUTPUT")[-1]
    assert node.vector is not None
    assert node.projection is not None
    (read,) = client.project(node.vector.float32(), target=" Tokyo")
    assert read.top_tokens == node.projection.top_tokens
    assert read.target_rank == node.projection.target_rank == 0
    assert read.entropy_bits == pytest.approx(node.projection.entropy_bits, abs=1e-4)
    assert np.linalg.norm(node.vector.float32()) == pytest.approx(node.norm, rel=1e-5)


def test_log_probabilities_do_not_underflow(client: Client, trace: Trace) -> None:
    vectors = client.trace(PROMPT, vectors=True, layers=[3], node_kinds=["PREDICTION"])
    vector = vectors.node_list[0].vector
    assert vector is not None
    loud = client.project(vector.float32() * 100, target=" Paris", lens="RAW")[0]
    assert loud.target_probability == 0 == loud.bottom[0].probability
    assert loud.target_logit is not None
    assert loud.target_log_probability is not None
    # The top token has a probability of 1, so its logit is the normaliser.
    expected = loud.target_logit - loud.top[0].logit
    assert loud.target_log_probability == pytest.approx(expected, rel=1e-6)
    assert loud.top[0].log_probability == pytest.approx(0, abs=1e-3)
    target = trace.target()
    assert target.target_log_probability == pytest.approx(math.log(target.target_probability))
    effect = client.preview_edit(PROMPT, " Paris", januslens.ForwardShift(3, 0.1)).edited
    assert effect.log_probability_after == pytest.approx(math.log(effect.probability_after))
    outcome = client.intervene(PROMPT, experiments=[januslens.interventions.zero("MLP_OUTPUT")])
    after = outcome.effects[0].after[0]
    assert after.log_probability == pytest.approx(math.log(after.probability), abs=1e-5)
    generated = client.generate(PROMPT, max_new_tokens=1, layers="all").tokens[0]
    for read in generated.layers:
        assert read.log_probability == pytest.approx(math.log(read.probability), abs=1e-5)


def test_frames_are_written_to_parquet_and_have_ids_texts_and_contributions(
    client: Client, trace: Trace, tmp_path: Path
) -> None:
    gradient = client.gradient_lens(PROMPT, " Tokyo", layers=[0, 3], subject="Japan")
    preview = client.preview_edit(
        PROMPT, " Paris", januslens.ForwardShift(3, 0.1), probes=["The capital of Peru is"]
    )
    frames = {
        "nodes": trace.nodes,
        "edges": trace.edges,
        "contributions": trace.contributions().to_pandas(),
        "heads": trace.heads().to_pandas(),
        "segments": gradient.segments.to_pandas(),
        "preview": preview.to_pandas(),
    }
    for name, frame in frames.items():
        frame.to_parquet(tmp_path / name)
        read = pd.read_parquet(tmp_path / name)
        assert list(read.columns) == list(frame.columns)
        assert len(read) == len(frame) > 1
    best = trace.contributions()[0]
    row = frames["contributions"].iloc[0]
    assert row["sum"] == (best.edge.target if best.edge else None)
    assert row["logit_contribution"] == best.logit_contribution
    value = trace.nodes_of("MEMORY_VALUE")[0]
    node = trace.nodes.loc[value.id]
    assert node["source_token"] == trace.prompt_tokens[value.source_position or 0].text
    assert value.projection is not None
    assert node["top_token_ids"] == [token.id for token in value.projection.top_tokens]
    assert node["top_logit"] == value.projection.top[0].logit
    assert frames["preview"]["predicted_before"].iloc[0] == " Tokyo"
    # At the last layer only the last position has a VJP, so other segments have no rank.
    last = frames["segments"].query("layer == 3 and kind == 'FF2'").set_index("segment")
    assert last["mean_target_rank"].isna().to_dict() == {
        name: name != "last_token" for name in last.index
    }


def test_heads_of_several_positions_are_in_the_order_of_positions(client: Client) -> None:
    heads = client.trace(PROMPT, positions=[3, -1], layers=[2]).heads()
    assert [head.node.position for head in heads] == sorted([3, 7] * HEADS)
    shares = [abs(head.share or 0) for head in heads]
    assert shares[:HEADS] == sorted(shares[:HEADS], reverse=True)


def test_neurons_that_write_a_token(client: Client) -> None:
    found = client.find_neurons(" Tokyo", limit=None)
    assert found.token.text == " Tokyo"
    assert len(found.neurons) == found.total > 50
    assert [hit.rank for hit in found.neurons] == sorted(hit.rank for hit in found.neurons)
    first = found.neurons[0]
    assert first.value.top_tokens[first.rank] == found.token
    assert str(first) == f"L{first.layer} neuron {first.neuron}"
    assert (first.value.target_rank, first.value.target_logit) == (first.rank, first.logit)
    some = client.find_neurons(found.token.id, limit=30)
    assert some.neurons == found.neurons[:30]
    assert (some.total, some.depth) == (found.total, found.depth)
    frame = some.to_pandas()
    assert frame["neuron"].tolist() == [hit.neuron for hit in some.neurons]
    assert frame["expert"].isna().all()
    assert frame["top_tokens"][0][first.rank] == " Tokyo"
    low = client.find_neurons(" Tokyo", suppressed=True, layers=[3], limit=5)
    assert {hit.layer for hit in low.neurons} == {3}
    assert low.neurons[0].value.bottom_tokens[0].text == " Tokyo"
    with pytest.raises(ValueError, match="limit"):
        client.find_neurons(" Tokyo", limit=0)
    with pytest.raises(januslens.InvalidRequest):
        client.find_neurons(" Tokyo Paris")


def test_token_ids_give_the_same_trace_as_text(client: Client, trace: Trace) -> None:
    ids = [token.id for token in trace.prompt_tokens]
    again = client.trace(ids, trace.target().target.id)
    assert again.layers == trace.layers


def test_recorded_trace_equals_the_original(trace: Trace) -> None:
    assert januslens.read_trace(trace.to_json_lines()) == trace


def test_a_step_promotes_the_target_at_the_named_end(client: Client) -> None:
    gradient = client.gradient_lens(PROMPT, " Paris", matrices=["FF2"])
    assert gradient.header.predicted.text == " Tokyo"
    component = gradient.matrix(LAYERS - 1, "FF2").components[0]
    assert component.position == 7
    assert component.promoted[0].text == " Paris"
    assert component.predicted_rank is not None
    assert component.predicted_rank < 10  # near the top: what a step suppresses


def test_matrices_come_from_the_last_layer_down(client: Client) -> None:
    with client.stream_gradient_lens(PROMPT, " Paris", matrices=["FF1"]) as stream:
        layers = [event.layer for event in stream if isinstance(event, Matrix)]
    assert layers == sorted(layers, reverse=True)


def test_factors_multiply_to_the_measured_gradient(client: Client) -> None:
    gradient = client.gradient_lens(
        PROMPT, " Paris", layers=[1], factors=True, components=0, spectrum=2, verify=True
    )
    for matrix in gradient.matrices:
        dense = matrix.gradient()
        assert dense.shape == (matrix.d_in, matrix.d_out)
        assert np.linalg.norm(dense) == pytest.approx(matrix.frobenius_norm, rel=1e-5)
        singular = np.linalg.svd(dense, compute_uv=False)
        found = [direction.value for direction in matrix.spectrum]
        np.testing.assert_allclose(found, singular[:2], rtol=1e-4)
        assert matrix.verification is not None
        assert matrix.verification.relative_error <= matrix.verification.tolerance


def test_gradients_of_attention_have_frames_and_heat_maps(client: Client, tmp_path: Path) -> None:
    gradient = client.gradient_lens(PROMPT, " Paris", matrices=["Q"], attention=True)
    assert [found.layer for found in gradient.attention] == [3, 2, 1, 0]
    layer = gradient.attention_of(-1)
    assert layer.pattern.shape == (8, HEADS, 8)
    np.testing.assert_allclose(layer.pattern.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(layer.score_gradient.sum(-1), 0, atol=1e-6)
    assert not layer.score_gradient[:-1].any()  # only the last position reaches the loss
    (place,) = layer.largest(1)
    frame = layer.to_pandas()
    assert len(frame) == HEADS * 8 * 9 / 2
    strongest = int(frame["score_gradient"].abs().argmax())
    assert frame.index[strongest] == (place.position, place.head, place.source)
    row = frame.iloc[strongest]
    assert row.tolist() == [place.probability, place.probability_gradient, place.score_gradient]
    printed = layer.heat_map(place.head, tokens=gradient.prompt_tokens)
    assert np.nanmax(np.abs(printed.values)) == pytest.approx(abs(place.score_gradient))
    assert f"{place.score_gradient:+.{printed.digits}f}" in str(printed)
    with pytest.raises(ValueError, match="invalid figure 'scores'"):
        layer.heat_map(0, "scores")
    gradient.save(tmp_path / "gradient.januslens")
    loaded = januslens.load(tmp_path / "gradient.januslens")
    assert isinstance(loaded, januslens.Gradient)
    np.testing.assert_array_equal(loaded.attention[3].pattern, gradient.attention[3].pattern)
    assert "pattern_gradient" not in gradient.to_html()
    with pytest.raises(KeyError, match="attention=True"):
        client.gradient_lens(PROMPT, " Paris", layers=[3]).attention_of(3)


def test_dense_gradient_needs_all_components(client: Client) -> None:
    gradient = client.gradient_lens(PROMPT, " Paris", layers=[1], factors=True, components=1)
    with pytest.raises(ValueError, match="components=0"):
        gradient.matrices[0].gradient()


def test_other_losses(client: Client, trace: Trace) -> None:
    tokyo = trace.target().target.id
    difference = client.gradient_lens(
        PROMPT, loss=januslens.LogitDifference(" Paris", tokyo), layers=[3]
    )
    assert difference.matrix(3, "FF2").components[0].promoted[0].text == " Paris"
    forgotten = client.gradient_lens(PROMPT, loss=januslens.KlDivergence([tokyo]), layers=[3])
    suppressed = forgotten.matrix(3, "FF2").components[0].suppressed
    assert " Tokyo" in [token.text for token in suppressed]


def test_negative_layers_count_from_the_last_one(client: Client, trace: Trace) -> None:
    assert client.trace(PROMPT, layers=[-1]).node_list == client.trace(PROMPT, layers=[3]).node_list
    assert trace.layer(-1) is trace.layer(3)
    last = client.gradient_lens(PROMPT, " Tokyo", layers=slice(-1, None), matrices=["FF2"])
    assert last.matrix(-1, "FF2").name == f"L{LAYERS - 1}.FF2"
    shifts = [
        client.preview_edit(PROMPT, " Paris", januslens.ForwardShift(layer, 0.1)).edited
        for layer in (-1, LAYERS - 1)
    ]
    assert shifts[0] == shifts[1]


def test_named_parts_and_targets_are_those_of_the_request(client: Client) -> None:
    trace = client.trace(
        PROMPT,
        only_heads=[(-1, 2), (1, 0)],
        only_neurons=[(-1, 7)],
        positions=[3, -1],
        targets={3: " was"},
        next_tokens=True,
        target=" Paris",
    )
    assert [layer.layer for layer in trace.layers] == [1, LAYERS - 1]
    heads = {(part.node.layer, part.node.head) for part in trace.heads()}
    assert heads == {(1, 0), (LAYERS - 1, 2)}
    assert [part.node.neuron for part in trace.neurons(-1)] == [7]
    assert [target.target.text for target in trace.targets] == [" was", " Paris"]
    with pytest.raises(ValueError, match=r"invalid entry .* of only_neurons; expected"):
        client.trace(PROMPT, only_neurons=[(1,)])


def test_ids_of_nodes_name_their_heads_and_neurons(client: Client) -> None:
    whole = client.trace(PROMPT, layers=[1])
    head, neuron = whole.heads()[-1].node, whole.neurons()[-1].node
    named = client.trace(PROMPT, only_heads=[head.id], only_neurons=[neuron.id])
    assert [part.node.id for part in named.heads()] == [head.id]
    assert [part.node.id for part in named.neurons()] == [neuron.id]
    for other in (head.id + "/s0", neuron.id):
        with pytest.raises(ValueError, match=r"of only_heads; expected an id such as"):
            client.trace(PROMPT, only_heads=[other])


def test_ids_of_nodes_name_sources_of_heads(client: Client) -> None:
    whole = client.trace(PROMPT, layers=[1])
    source = whole.nodes_of("MEMORY_VALUE")[3]
    place = (1, source.head or 0, (source.source_position or 0) - len(whole.prompt))
    for named in (source.id, place):
        found = client.trace(PROMPT, only_sources=[named])
        assert [layer.layer for layer in found.layers] == [1]
        assert [node.id for node in found.nodes_of("MEMORY_VALUE")] == [source.id]
        assert [part.node.head for part in found.heads()] == [source.head]
    with pytest.raises(ValueError, match=r"of only_sources; expected an id such as"):
        client.trace(PROMPT, only_sources=[whole.heads()[0].node.id])
    with pytest.raises(ValueError, match=r"invalid entry .* of only_sources; expected \(layer,"):
        client.trace(PROMPT, only_sources=[(1, 2)])  # type: ignore[list-item]  # not three
    with pytest.raises(januslens.errors.InvalidRequest, match="outside the prompt"):
        client.trace(PROMPT, only_sources=[(1, 2, 99)])


def test_grid_of_edits_has_the_effects_of_single_edits(client: Client) -> None:
    probes = ["The capital of Peru is the city of"]
    grid = client.preview_edits(
        PROMPT, " Paris", learning_rates=[0.5, 1.0], layers=[0, -1], probes=probes
    )
    assert (grid.layers, grid.strengths) == ((0, LAYERS - 1), (0.5, 1.0))
    for cell in grid.cells:
        step = januslens.DescentStep(cell.strength, layers=[cell.layer])
        single = client.preview_edit(PROMPT, " Paris", step, probes=probes)
        assert (cell.edited, cell.probes) == (single.edited, single.probes)
    frame = grid.to_pandas()
    edited = frame[frame["label"] == ""].pivot(
        index="layer", columns="strength", values="probability_after"
    )
    assert edited.to_numpy()[0, 0] == grid.cells[0].edited.probability_after
    assert len(frame) == 2 * len(grid.cells)
    assert frame["gradient_cosine"].isna().all()
    shifts = client.preview_edits(PROMPT, " Paris", etas=[0.1], gradient_cosine=True)
    assert shifts.layers == tuple(range(LAYERS))
    shift = januslens.ForwardShift(shifts.cells[0].layer, 0.1, gradient_cosine=True)
    single_shift = client.preview_edit(PROMPT, " Paris", shift)
    assert single_shift.gradient_cosine == shifts.cells[0].gradient_cosine != 0
    with pytest.raises(ValueError, match="a descent step follows the gradient"):
        client.preview_edits(PROMPT, " Paris", learning_rates=[0.1], gradient_cosine=True)
    for strengths in ([], [1.0]):
        with pytest.raises(ValueError, match="of learning_rates and etas are given; give one"):
            client.preview_edits(PROMPT, " Paris", learning_rates=strengths, etas=strengths)


def test_tokens_to_suppress_are_ids_or_texts(client: Client, trace: Trace) -> None:
    tokyo = trace.target().target.id
    by_id, by_text = (
        client.gradient_lens(PROMPT, loss=januslens.KlDivergence(tokens), layers=[3])
        for tokens in ([tokyo], " Tokyo")
    )
    assert by_text.header.targets == by_id.header.targets
    assert by_text.loss == by_id.loss


def test_an_empty_prompt_is_the_bos_token(client: Client) -> None:
    trace = client.trace("", layers=[0])
    assert [token.text for token in trace.prompt_tokens] == ["<|endoftext|>"]
    assert trace.target().predicted == client.trace([0], layers=[0]).target().predicted


def test_previewed_edit_does_not_change_the_model(client: Client, trace: Trace) -> None:
    shift = januslens.ForwardShift(LAYERS - 1, eta=0.15)
    preview = client.preview_edit(PROMPT, " Paris", shift, probes=["The capital of Peru is"])
    assert preview.edited.target.text == preview.edited.predicted_after.text == " Paris"
    assert preview.edited.predicted_before.text == " Tokyo"
    assert preview.edited.rank_after == 0 < preview.edited.rank_before
    assert preview.edited.kl_bits > 1
    assert [effect.label for effect in preview.probes] == ["The capital of Peru is"]
    assert client.trace(PROMPT).layers == trace.layers


def test_a_step_raises_its_target(client: Client) -> None:
    step = januslens.DescentStep(1e-3)
    effect = client.preview_edit(PROMPT, " Paris", step).edited
    assert effect.probability_after > effect.probability_before


@pytest.mark.parametrize(
    ("prompt", "options", "error", "field"),
    [
        (PROMPT, {"model": "absent"}, januslens.ModelNotFound, None),
        (PROMPT, {"revision": "absent"}, januslens.RevisionNotFound, None),
        (januslens.Text("", special_tokens=False), {}, januslens.InvalidRequest, "input"),
        ([2**31], {}, januslens.InvalidRequest, "input"),
        (PROMPT, {"layers": [LAYERS]}, januslens.InvalidRequest, "layers"),
        (PROMPT, {"positions": [99]}, januslens.InvalidRequest, "positions"),
        (PROMPT, {"target": " Tokyo Paris"}, januslens.InvalidRequest, "target"),
        ([1] * 1000, {}, januslens.InvalidRequest, "input"),
    ],
)
def test_refused_request_raises_a_typed_error_with_the_field(
    client: Client,
    prompt: str | januslens.Text | list[int],
    options: dict[str, str | list[int]],
    error: type[januslens.JanuslensError],
    field: str | None,
) -> None:
    with pytest.raises(error) as caught:
        client.trace(prompt, **options)  # type: ignore[arg-type]  # of several types
    assert caught.value.reason
    assert caught.value.message
    if field is not None:
        assert caught.value.field_violations[0].field.startswith(field)


def test_a_client_learns_about_its_server(client: Client) -> None:
    (listed,) = client.list_models()
    assert client.model() == client.model(listed.name) == listed
    info = client.server_info()
    assert info.version == januslens.__version__
    assert {"Trace", "GetServerInfo"} <= set(info.rpcs)
    assert info.limits == {
        "max_request_seconds": 600.0,
        "max_request_stream": 2.0 * 2**30,
        "preparation_seconds": 30.0,
    }


def test_an_errors_request_id_is_in_the_servers_log(client: Client, server: ServerProcess) -> None:
    with pytest.raises(januslens.ModelNotFound) as caught:
        client.trace(PROMPT, model="absent")
    server.wait_for(caught.value.request_id)


def test_estimate_is_an_upper_bound_of_a_trace(client: Client, trace: Trace) -> None:
    cost = client.estimate_trace(PROMPT)
    read = int(trace.nodes["entropy_bits"].notna().sum())
    assert read <= cost.projected_vectors <= 2 * read
    assert (cost.admissible, cost.exceeded, cost.limit_exceeded) == (True, (), "")
    gradient = client.estimate_gradient_lens(PROMPT, " Paris", verify=True)
    assert gradient.flops > 5 * client.estimate_gradient_lens(PROMPT, " Paris").flops


async def test_the_async_client_estimates_the_same(server_address: str, client: Client) -> None:
    async with AsyncClient(server_address) as other:
        found = await other.estimate_trace(PROMPT, layers=[1])
    assert found.stream_bytes == client.estimate_trace(PROMPT, layers=[1]).stream_bytes


def test_a_cancelled_stream_leaves_the_server_serving(client: Client, trace: Trace) -> None:
    for _ in range(3):
        with client.stream_trace(PROMPT, positions="all", heads=0, top_neurons=0) as stream:
            next(stream)
    assert client.trace(PROMPT).layers == trace.layers


def test_a_deadline_ends_the_call(client: Client) -> None:
    with pytest.raises(januslens.DeadlineExceeded):
        client.trace(PROMPT, positions="all", heads=0, top_neurons=0, timeout=0.01)


async def test_async_client_finds_the_same_neurons(server_address: str, trace: Trace) -> None:
    async with AsyncClient(server_address, timeout=120) as client:
        traced, gradient, models, tokens = await asyncio.gather(
            client.trace(PROMPT),
            client.gradient_lens(PROMPT, " Paris", layers=[3]),
            client.list_models(),
            client.tokenize(PROMPT),
        )
        found = await client.find_neurons(" Tokyo", limit=1)
        (read,) = await client.project(np.ones(models[0].d_model), top_k=1)
    assert traced.layers == trace.layers
    assert gradient.matrix(3, "FF2").components[0].promoted[0].text == " Paris"
    assert len(tokens) == 8
    assert len(found.neurons) == 1
    assert len(read.top) == 1


async def test_the_async_client_streams(server_address: str, trace: Trace) -> None:
    async with AsyncClient(server_address, timeout=120) as client:
        async with client.stream_trace(PROMPT) as stream:
            layers = [event async for event in stream if isinstance(event, LayerGraph)]
        with pytest.raises(januslens.ModelNotFound):
            await client.trace(PROMPT, model="absent")
    assert tuple(layers) == trace.layers

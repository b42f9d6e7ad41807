"""The tables of a survey have the figures of the records that the client reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import januslens
from januslens import Experiment, Probe, SweepOver, zero

PROMPTS = ["The capital of Japan is the city of", "The capital of Peru is the city of"]
TARGETS = [" Tokyo", " Lima"]
LINES = [{"prompt": p, "target": t} for p, t in zip(PROMPTS, TARGETS, strict=True)]


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[januslens.Client]:
    with januslens.Client(server_address) as opened:
        yield opened


def rows(survey: januslens.Survey, table: str, prompt: int) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = survey.dataset(table).to_table().to_pylist()
    return [row for row in listed if row["prompt"] == prompt]


def projection(read: januslens.Projection | None) -> dict[str, Any]:
    """The columns of a projection, from its record."""
    columns: dict[str, Any] = {}
    for end in ("top", "bottom"):
        scores = None if read is None else getattr(read, end)
        columns |= {
            f"{end}_token_ids": scores and [score.token.id for score in scores],
            f"{end}_tokens": scores and [score.token.text for score in scores],
            f"{end}_probabilities": scores and [score.probability for score in scores],
            f"{end}_logits": scores and [score.logit for score in scores],
        }
    for name in ("entropy_bits", "target_rank", "target_probability", "target_logit"):
        columns[name] = getattr(read, name, None)
    return columns


def assert_row(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the expected columns of a row; sums of float32 figures may be rounded."""
    shown = {name: row[name] for name in expected}
    numbers = {n for n, value in expected.items() if isinstance(value, float)}
    for name in numbers:
        assert shown[name] == pytest.approx(expected[name], rel=1e-6), name
    assert {n: v for n, v in shown.items() if n not in numbers} == {
        n: v for n, v in expected.items() if n not in numbers
    }


def test_nodes_and_edges_equal_those_of_traces(client: januslens.Client, tmp_path: Path) -> None:
    options: dict[str, Any] = {"attribution": True, "gradients": True, "overlap_k": 5}
    survey = client.survey(LINES, tmp_path / "out", vectors=True, **options)
    assert survey.complete
    for number, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        trace = client.trace(prompt, target, vectors=True, **options)
        parts = {e.source: e for e in trace.edge_list if e.kind is januslens.EdgeKind.PART}
        found = rows(survey, "nodes", number)
        assert len(found) == len(trace.node_list)
        for row, node in zip(found, trace.node_list, strict=True):
            names = "id layer position head source_position neuron expert norm activation"
            own = {name: getattr(node, name) for name in [*names.split(), "gradient_norm"]}
            edge = parts.get(node.id)
            own |= {"kind": str(node.kind), "sum": edge.target if edge else None}
            own |= {n: getattr(edge, n, None) for n in ("share", "attention", "attribution")}
            assert_row(row, own | projection(node.projection))
        edges = rows(survey, "edges", number)
        for row, edge in zip(edges, trace.edge_list, strict=True):
            names = "source target weight share attention logit_contribution overlap attribution"
            assert_row(row, {name: getattr(edge, name) for name in names.split()})
        (asked,) = rows(survey, "targets", number)
        assert asked["target"] == target
        assert asked["target_rank"] == trace.target().target_rank
        states = [node for node in trace.node_list if node.gradient is not None]
        for row, node in zip(rows(survey, "state_gradients", number), states, strict=True):
            assert_row(row, {"id": node.id} | projection(node.gradient))
        (tensor,) = rows(survey, "tensors", number)
        vectors = load_file(survey.path / tensor["file"])[tensor["name"]]
        expected = [node.vector.float32() for node in trace.node_list if node.vector is not None]
        assert (vectors == np.stack(expected)).all()
        assert [row["text"] for row in rows(survey, "tokens", number)] == [
            token.text for token in trace.prompt_tokens
        ]


def test_components_equal_those_of_gradients(client: januslens.Client, tmp_path: Path) -> None:
    options: dict[str, Any] = {"spectrum": 2, "neurons": 3, "factors": True, "layers": [1, 3]}
    lines = [line | {"subject": "Japan" if i == 0 else "Peru"} for i, line in enumerate(LINES)]
    survey = client.survey(lines, tmp_path / "out", rpc="gradient_lens", **options)
    for number, line in enumerate(lines):
        gradient = client.gradient_lens(
            line["prompt"], line["target"], subject=line["subject"], **options
        )
        components = [(m, c) for m in gradient.matrices for c in m.components]
        found = rows(survey, "components", number)
        for row, (matrix, one) in zip(found, components, strict=True):
            own: dict[str, Any] = {"layer": matrix.layer, "kind": str(matrix.kind)}
            own |= {"promoted_end": str(one.promoted_end), "target_ranks": list(one.target_ranks)}
            names = ("position", "input_norm", "vjp_norm", "size", "predicted_rank")
            own |= {name: getattr(one, name) for name in names}
            assert_row(row, own | projection(one.projection))
        singular = [one for matrix in gradient.matrices for one in matrix.spectrum]
        for row, value in zip(rows(survey, "singular_values", number), singular, strict=True):
            assert_row(row, {"value": value.value} | projection(value.projection))
        changes = [
            (name, neuron)
            for name in ("before", "change", "after")
            for matrix in gradient.matrices
            for neuron in matrix.neurons
        ]
        for row, (name, neuron) in zip(
            rows(survey, "neuron_changes", number), changes, strict=True
        ):
            own = {"neuron": neuron.neuron, "vector": name}
            assert_row(row, own | projection(getattr(neuron, name)))
        segments = rows(survey, "segments", number)
        assert [(row["segment"], row["kind"]) for row in segments] == [
            (row.segment, str(row.kind)) for row in gradient.segments
        ]
        assert [row["mean_vjp_norm"] for row in segments] == pytest.approx(
            [row.mean_vjp_norm for row in gradient.segments]
        )
        matrices = rows(survey, "matrices", number)
        assert [row["component_count"] for row in matrices] == [
            matrix.component_count for matrix in gradient.matrices
        ]
        (loss,) = rows(survey, "losses", number)
        assert (loss["loss"], loss["targets"]) == (gradient.loss, [line["target"]])
        inputs, vjps = gradient.matrix(3, "FF2").factors()
        listed = {row["name"]: row["file"] for row in rows(survey, "tensors", number)}
        for factor, expected in (("input", inputs), ("vjp", vjps)):
            name = f"{number}.L3.FF2.{factor}"
            assert (load_file(survey.path / listed[name])[name] == expected).all()


def test_effects_equal_those_of_interventions(client: januslens.Client, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "experiments": [Experiment([zero(heads=[(3, 0)])], label="a head")],
        "sweep": SweepOver(zero("HEAD_RESULT", layers=[2, 3]), by=["layer", "head"]),
        "positions": [-2, -1],
    }
    lines = [line | {"other": " Paris"} for line in LINES]
    survey = client.survey(lines, tmp_path / "out", rpc="intervene", **options)
    for number, line in enumerate(lines):
        effects = client.intervene(line["prompt"], target=line["target"], other=" Paris", **options)
        expected = effects.to_pandas()
        found = pd.DataFrame(rows(survey, "effects", number))
        for name in expected:
            column = "top_tokens" if name == "predicted" else name
            values = found[column].tolist()
            values = [listed[0] for listed in values] if name == "predicted" else values
            pd.testing.assert_series_equal(
                pd.Series(values, name=name, dtype=expected[name].dtype),
                expected[name],
                rtol=1e-4,
                atol=1e-5,
            )
        before = rows(survey, "baselines", number)
        assert [row["logit_difference"] for row in before] == [
            prediction.logit_difference for prediction in effects.before
        ]


def test_edits_equal_those_of_previews(client: januslens.Client, tmp_path: Path) -> None:
    options: dict[str, Any] = {"etas": [0.05, 0.15], "layers": [2, 3], "gradient_cosine": True}
    neighbour, plain = Probe(PROMPTS[1], label="neighbour"), "The capital city of Japan is called"
    probes = [neighbour, {"prompt": "The currency of Japan is the", "target": " yen"}, plain]
    lines: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "target": " Lima", "probes": probes},
        {"prompt": PROMPTS[1], "target": " Paris"},
    ]
    survey = client.survey(lines, tmp_path / "out", rpc="preview_edits", **options)
    records = [neighbour, Probe("The currency of Japan is the", " yen"), Probe(plain)]
    listed: list[list[Probe]] = [records, []]
    for number, read in enumerate(listed):
        target = lines[number]["target"]
        previews = client.preview_edits(PROMPTS[number], target, probes=read, **options)
        expected = [
            {"layer": cell.layer, "strength": cell.strength, "probe": probe, "label": effect.label}
            | {"target": effect.target.text, "predicted_after": effect.predicted_after.text}
            | {n: getattr(effect, n) for n in ("rank_before", "rank_after", "kl_bits")}
            | {"log_probability_after": effect.log_probability_after}
            | {"gradient_cosine": cell.gradient_cosine}
            for cell in previews.cells
            for probe, effect in [(None, cell.edited), *enumerate(cell.probes)]
        ]
        for row, own in zip(rows(survey, "edits", number), expected, strict=True):
            assert_row(row, own)
    assert survey.dataset("prompts").to_table()["token_count"].to_pylist() == [None, None]
    single = januslens.SurveyRequest.from_json("preview_edits", '{"shift": {"layer": 3, "eta": 1}}')
    survey = client.survey(lines, tmp_path / "single", rpc=single)
    assert [row["probe"] for row in rows(survey, "edits", 0)] == [None, 0, 1, 2]
    assert {row["layer"] for row in rows(survey, "edits", 0)} == {None}


def test_tokens_equal_those_of_generations(client: januslens.Client, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": "all", "max_new_tokens": 3}
    survey = client.survey(PROMPTS, tmp_path / "out", rpc="generate", **options)
    for number, prompt in enumerate(PROMPTS):
        made = client.generate(prompt, **options)
        (text,) = rows(survey, "texts", number)
        assert (text["text"], text["finish_reason"]) == (made.text, made.finish_reason)
        for row, token in zip(rows(survey, "generated", number), made, strict=True):
            own = {"token_id": token.token.id, "decided": token.decided}
            assert_row(row, own | {"top_tokens": [listed.text for listed, _ in token.top]})
        layers = [(i, read) for i, token in enumerate(made) for read in token.layers]
        for row, (step, read) in zip(rows(survey, "readings", number), layers, strict=True):
            own = {"step": step, "layer": read.layer, "rank": read.rank}
            assert_row(row, own | {"log_probability": read.log_probability})


def test_tensors_equal_those_of_activations(client: januslens.Client, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sites": ["HEAD_RESULT", "LOGITS"], "layers": None}
    survey = client.survey(PROMPTS, tmp_path / "out", rpc="activations", **options)
    for number, prompt in enumerate(PROMPTS):
        activations = client.activations(prompt, **options)
        listed = rows(survey, "tensors", number)
        for row, tensor in zip(listed, activations.tensors, strict=True):
            values = load_file(survey.path / row["file"])[row["name"]]
            assert (values == tensor.numpy()).all()
            assert (row["site"], row["layer"]) == (str(tensor.site), tensor.layer)
            assert row["positions"] == list(activations.positions)


def test_prompts_have_their_own_columns(client: januslens.Client, tmp_path: Path) -> None:
    lines = [
        json.dumps("The capital of Japan is the city of"),
        "",
        json.dumps({"prompt": [5, 6], "id": "ids", "target": 12, "labels": {"n": 1, "mixed": 1}}),
        json.dumps({"prompt": "A", "labels": {"mixed": "x", "ok": True}}),
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    survey = client.survey(file, tmp_path / "out", node_kinds=["PREDICTION"])
    found = survey.dataset("prompts").to_table().to_pylist()
    assert [row["text"] for row in found] == [json.loads(lines[0]), "[5, 6]", "A"]
    assert found[1] | {"target": "12", "id": "ids", "token_count": 2} == found[1]
    labels = [{n: row[f"label_{n}"] for n in ("n", "mixed", "ok")} for row in found]
    assert labels == [
        {"n": None, "mixed": None, "ok": None},
        {"n": 1.0, "mixed": "1", "ok": None},
        {"n": None, "mixed": "x", "ok": True},
    ]

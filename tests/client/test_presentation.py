"""Compare formats, names and sentences with texts written by hand; check the fixtures."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from januslens import NodeKind
from januslens import _presentation as presentation
from januslens.assemblers import TraceAssembler
from januslens.results.models import Model, Provenance
from januslens.v1 import common_pb2, models_pb2, trace_pb2
from tests.client import messages
from tests.client import presentation_fixtures as fixtures


@pytest.mark.parametrize("name", fixtures.files())
def test_a_fixture_is_what_its_generator_writes(name: str) -> None:
    written = (fixtures.FOLDER / name).read_text(encoding="utf-8")
    assert written == fixtures.text_of(fixtures.files()[name])


def test_there_are_no_unused_fixtures() -> None:
    assert {path.name for path in fixtures.FOLDER.iterdir()} == set(fixtures.files())


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (presentation.probability, 0.9917, "0.992"),
        (presentation.probability, 0.0005, "0.001"),
        (presentation.probability, 0.0004, "4e-04"),
        (presentation.probability, 0.0, "0.000"),
        (presentation.signed, 1.5, "+1.50"),
        (presentation.signed, -0.256, "-0.26"),
        (presentation.signed, -0.001, "+0.00"),
        (presentation.percent, 0.43, "43 %"),
        (presentation.percent, -0.031, "-3.1 %"),
        (presentation.percent, 0.0005, "0.05 %"),
        (presentation.percent, -0.00001, "0 %"),
        (presentation.percent, 1.125, "112 %"),
        (presentation.measure, 21.66, "21.7"),
        (presentation.measure, 1234.0, "1230"),
        (presentation.measure, 1234567.0, "1.23e+06"),
        (presentation.measure, 0.0000605, "6.05e-05"),
        (presentation.measure, 0.00009999, "0.0001"),
        (presentation.measure, 0.0, "0"),
        (presentation.count, 50257, "50\u2009257"),
        (presentation.probability, float("nan"), "not finite"),
        (presentation.signed, float("-inf"), "not finite"),
        (presentation.signed, -2.5e6, "-2.5e+06"),
        (presentation.percent, float("inf"), "not finite"),
        (presentation.percent, -2e4, "-2e+06 %"),
        (presentation.measure, float("nan"), "not finite"),
        (presentation.measure, -999_999.0, "-1e+06"),
    ],
)
def test_number_formats_match_the_fixture(
    form: Callable[[Any], str], value: Any, text: str
) -> None:
    assert form(value) == text


@pytest.mark.parametrize(
    ("rank", "vocabulary", "expected"),
    [
        (0, None, "top"),
        (9, None, "< 10"),
        (10, None, "< 100"),
        (999, 50257, "< 1k"),
        (25000, 50257, "middle"),
        (50257 - 1000, 50257, "last 1k"),
        (50256, 50257, "last 100"),
        (50256, None, "middle"),
        (None, 50257, "middle"),
        (511, 512, "last 100"),
    ],
)
def test_rank_bins_match_the_fixture(
    rank: int | None, vocabulary: int | None, expected: str
) -> None:
    assert presentation.rank_bin(rank, vocabulary) == expected
    assert expected in presentation.RANK_BINS


def test_the_colour_of_a_norm_goes_from_the_first_to_the_last_stop() -> None:
    assert presentation.norm_colour(0, 4) == (245, 236, 222)
    assert presentation.norm_colour(1, 4) == (231, 147, 124)  # the middle of a square-root scale
    assert presentation.norm_colour(4, 4) == presentation.norm_colour(9, 4) == (94, 42, 104)
    assert presentation.norm_colour(0, 0) == (245, 236, 222)


def test_every_kind_of_node_has_a_name() -> None:
    assert set(NodeKind) - set(presentation.NODE_NAMES) == {NodeKind.UNSPECIFIED}


SENTENCES = {
    "the target ranks first from the MLP on": [
        "␣c after ␣b (1): the model's own prediction, probability 0.500.",
        "Ranked first from layer 0's MLP onwards.",
        (
            "L0 head 0 adds most of the selected heads: +1.50 to its logit, "
            "reading a (0) with attention 0.75."
        ),
        "L0 neuron 7 adds most of the selected neurons: +2.00 to its logit.",
    ],
    "attention and MLP are parallel": [
        "␣c after ␣b (1): the model's own prediction, probability 0.500.",
        "Ranked first from layer 0's attention and MLP onwards.",
        (
            "L0 head 0 adds most of the selected heads: +1.50 to its logit, "
            "reading a (0) with attention 0.75."
        ),
        "L0 neuron 7 adds most of the selected neurons: +2.00 to its logit.",
    ],
    "the parts were selected by their contributions": [
        "␣c after ␣b (1): the model's own prediction, probability 0.500.",
        "Ranked first from layer 0's MLP onwards.",
        "L0 head 0 adds most: +1.50 to its logit, reading a (0) with attention 0.75.",
        "L0 neuron 7 adds most: +2.00 to its logit.",
    ],
    "no logit contributions": [
        "␣c after ␣b (1): the model's own prediction, probability 0.500.",
        "Ranked first from layer 0's MLP onwards.",
    ],
    "the target never ranks first": [
        "␣d after ␣b (1): rank 7, probability 4e-04; the model predicts ␣c.",
        "Best rank 3 after layer 0's MLP; final rank 3.",
        (
            "L0 head 0 adds most of the selected heads: +1.50 to its logit, "
            "reading a (0) with attention 0.75."
        ),
        "L0 neuron 7 adds most of the selected neurons: +2.00 to its logit.",
    ],
}


def test_sentences_of_a_trace_match_the_fixture() -> None:
    cases = {case["case"]: case for case in fixtures.files()["traces.json"]}
    assert {case: cases[case]["sentences"] for case in SENTENCES} == SENTENCES
    coarse = cases["a layer shows only its sublayers"]
    assert coarse["levels"] == [
        (
            "layers 0 to 2: residual stream, mamba (state space), mlp (MLP) only "
            "(layer 0 has 3 linear maps)"
        ),
        "layer 4: residual stream only (no sum)",
    ]
    assert [step["name"] for step in coarse["residual_steps"]] == ["input", "+ mixer", "+ MLP"]
    mixed = cases["a whole layer has a mixer beside its sublayers"]
    assert [step["name"] for step in mixed["residual_steps"]] == ["input", "+ mixer", "+ MLP"]
    alone = cases["a block has an MLP and no attention"]
    assert alone["sentences"][1] == "Ranked first from layer 0's MLP onwards."
    assert [step["name"] for step in alone["residual_steps"]] == ["input", "+ MLP"]
    assert cases["no residual has a reading"]["sentences"][1] == (
        "No residual of this position was traced."
    )
    assert cases["the target has no rank"]["sentences"][1] == (
        "No residual of this position was traced."
    )
    assert cases["the remainder of the sources has the largest attention"]["sentences"][2] == (
        "L0 head 0 adds most of the selected heads: +1.50 to its logit, "
        "reading a (0) with attention 0.75."
    )
    assert cases["no source has a position"]["sentences"][2] == (
        "L0 head 0 adds most of the selected heads: +1.50 to its logit."
    )
    assert cases["a contribution is not finite"]["sentences"][2] == (
        "L0 head 1 adds most of the selected heads: -0.25 to its logit."
    )
    assert cases["the best neuron belongs to an expert"]["sentences"][3] == (
        "L0 expert 1 neuron 7 adds most of the selected neurons: +2.00 to its logit."
    )


def test_contribution_tree_lists_the_rest_of_each_node_after_its_parts() -> None:
    case = fixtures.files()["traces.json"][0]
    assert case["contributions"] == [
        [0, "logit, from L0 residual after the block", "+4.00"],
        [1, "L0 MLP's result", "+1.75"],
        [2, "L0 neuron 7 value", "+2.00"],
        [2, "L0 neuron 8 value", "+0.25"],
        [2, "rest", "-0.50"],
        [1, "L0 attention's result", "+1.25"],
        [2, "L0 head 0 output", "+1.50"],
        [3, "L0 head 0 value of a (0)", "+1.50"],
        [3, "rest", "+0.00"],
        [2, "L0 head 1 output", "-0.25"],
        [2, "rest", "+0.00"],
        [1, "embedding of \u2423b (1)", "+0.50"],
        [1, "rest", "+0.50"],
    ]


def test_sentence_of_the_loss_matches_the_fixture() -> None:
    one, two = fixtures.files()["gradients.json"]
    assert one["sentence"] == "Loss 1.25 for ␣c; the model predicts ␣d."
    # exp(-1.25) = 0.2865
    assert one["likelihood_sentence"] == (
        "Loss 1.25 for ␣c, probability 0.287; the model predicts ␣d."
    )
    assert two["sentence"] == "Loss 12.35 for ␣c⏎; the model predicts ␣d."


def test_a_gradient_has_its_components_largest_first() -> None:
    components = fixtures.files()["gradients.json"][0]["components"]["L1.FF2"]
    assert [(part["position"], part["size"]) for part in components] == [(1, "10"), (0, "2")]
    assert components[0]["promoted"] == ["␣c", "a"]  # descent promotes δ's bottom


def test_a_model_is_described_with_the_format_and_the_lora_of_its_weights() -> None:
    stored = common_pb2.Provenance(
        model="m", architecture="A", data_type="float32", device="cpu", revision="0123456789abcdef"
    )
    plain = presentation.model_name(Provenance.from_message(stored))
    assert plain == "m (A, float32 on cpu), revision 0123456789ab"
    stored.quantization, stored.lora = "MXFP4", "rank 8 on q_proj"
    assert presentation.model_name(Provenance.from_message(stored)) == (
        "m (A, float32 on cpu, from MXFP4, with a LoRA of rank 8 on q_proj), revision 0123456789ab"
    )


def test_fixtures_are_plain_json() -> None:
    for path in fixtures.FOLDER.iterdir():
        json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0 %"), (0.425, "42 %"), (0.999, "99 %"), (1.0, "checking")]
)
def test_a_model_whose_weights_are_read_is_being_checked(fraction: float, text: str) -> None:
    model = Model.from_message(models_pb2.Model(loaded_fraction=fraction))
    assert presentation.loading_step(model) == text


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({}, ""),
        ({"first": True}, "1 check passed"),
        ({"first": True, "second": True}, "2 checks passed"),
        ({"first": False, "second": True, "third": False}, "failed: first, third"),
    ],
)
def test_the_self_check_is_summarized(held: dict[str, bool], text: str) -> None:
    guarantees = [common_pb2.Guarantee(name=name, held=passed) for name, passed in held.items()]
    model = Model.from_message(models_pb2.Model(guarantees=guarantees))
    assert presentation.checks(model) == text


def test_a_step_contributes_what_its_parts_contribute_together() -> None:
    parallel = fixtures.without_nodes("RESIDUAL_MID")
    both = {"L0/p1/ATTENTION_OUTPUT": 1.25, "L0/p1/MLP_OUTPUT": 1.75}
    for edge in messages.layer().edges:
        if edge.source == "L0/p1/ATTENTION_OUTPUT":
            parallel.edges.add().CopyFrom(edge)
            parallel.edges[-1].target = "L0/p1/BLOCK_OUTPUT"
    assert added(parallel) == {"+ attention and MLP": sum(both.values())}
    # The trace does not say what the attention adds.
    assert added(fixtures.without_nodes("RESIDUAL_MID")) == {"+ attention and MLP": None}
    assert added(fixtures.with_mixer()) == {"+ mixer": 1.25, "+ MLP": 1.75}


def added(layer: trace_pb2.LayerGraph) -> dict[str, float | None]:
    trace = fixtures.assembled(TraceAssembler(), fixtures.stream_of(layer))
    steps = presentation.all_residual_steps(trace, 1)
    return {step.name: step.contribution for step in steps if step.name != "input"}

"""An invalid field is INVALID_ARGUMENT, with the field's path and what was expected."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from januslens.v1 import (
    common_pb2,
    edits_pb2,
    gradient_lens_pb2,
    lens_pb2,
    models_pb2,
    neurons_pb2,
    trace_pb2,
)
from januslens.v1.common_pb2 import Input, Target, TokenIds
from tests.support.calls import prompt, refused, token_ids

PARIS = Target(text=" Paris")
NLL = gradient_lens_pb2.NegativeLogLikelihood(target=PARIS)

Model = models_pb2.Model
Case = tuple[str, str, Callable[[Model], Message], str]


def trace(**fields: Any) -> trace_pb2.TraceRequest:
    return trace_pb2.TraceRequest(**{"input": prompt("Japan"), **fields})


def gradient(**fields: Any) -> gradient_lens_pb2.GradientLensRequest:
    loss = {} if {"nll", "logit_difference", "kl"} & fields.keys() else {"nll": NLL}
    return gradient_lens_pb2.GradientLensRequest(**{"input": prompt("Japan"), **loss, **fields})


def vectors(*shape: int, value: float = 1.0, **fields: Any) -> common_pb2.Tensor:
    size = 1
    for length in shape:
        size *= length
    data = struct.pack(f"<{size}f", *[value] * size)
    float32 = common_pb2.DATA_TYPE_FLOAT32
    return common_pb2.Tensor(**{"data_type": float32, "shape": shape, "data": data, **fields})


def project(tensor: common_pb2.Tensor, **fields: Any) -> lens_pb2.ProjectRequest:
    return lens_pb2.ProjectRequest(vectors=tensor, **fields)


def neurons(**fields: Any) -> neurons_pb2.FindNeuronsRequest:
    return neurons_pb2.FindNeuronsRequest(**fields)


def inputs(method: str, request: Callable[..., Message]) -> list[Case]:
    """Return invalid fields of every request that runs a prompt."""
    return [
        (
            method,
            "empty prompt without special tokens",
            lambda _: request(input=Input(prompt="", add_special_tokens=False)),
            "input.prompt",
        ),
        (method, "no input", lambda _: request(input=Input()), "input"),
        (method, "no ids", lambda _: request(input=token_ids()), "input.token_ids.ids"),
        (
            method,
            "id = vocabulary",
            lambda m: request(input=token_ids(5, m.vocab_size)),
            "input.token_ids.ids[1]",
        ),
        (
            method,
            "largest id",
            lambda _: request(input=token_ids(2**32 - 1)),
            "input.token_ids.ids[0]",
        ),
        (
            method,
            "too many ids",
            lambda m: request(input=token_ids(*[5] * (m.max_positions + 1))),
            "input.token_ids.ids",
        ),
        (
            method,
            "text too long",
            lambda m: request(input=prompt(" Japan" * (m.max_positions + 1))),
            "input.prompt",
        ),
        (method, "layer", lambda m: request(layers=[0, m.n_layers]), "layers"),
        (method, "negative layer", lambda m: request(layers=[-1 - m.n_layers]), "layers"),
        (method, "lens", lambda _: request(lens=99), "lens"),
        (method, "top_k", lambda _: request(top_k=1001), "top_k"),
        (method, "bottom_k", lambda _: request(bottom_k=1001), "bottom_k"),
    ]


TRACE: list[Case] = [
    ("Trace", "position", lambda _: trace(input=token_ids(5, 6), positions=[2]), "positions"),
    ("Trace", "negative", lambda _: trace(input=token_ids(5, 6), positions=[-3]), "positions"),
    ("Trace", "both", lambda _: trace(positions=[0], all_positions=True), "all_positions"),
    ("Trace", "kind unspecified", lambda _: trace(node_kinds=[1, 0]), "node_kinds[1]"),
    ("Trace", "kind unknown", lambda _: trace(node_kinds=[99]), "node_kinds[0]"),
    ("Trace", "target empty", lambda _: trace(target=Target(text="")), "target"),
    ("Trace", "target unset", lambda _: trace(target=Target()), "target"),
    ("Trace", "target no ids", lambda _: trace(target=Target(token_ids=TokenIds())), "target"),
    (
        "Trace",
        "target id",
        lambda m: trace(target=Target(token_ids=TokenIds(ids=[m.vocab_size]))),
        "target.token_ids.ids[0]",
    ),
    ("Trace", "overlap", lambda _: trace(overlap_k=2**31), "overlap_k"),
]

GRADIENT: list[Case] = [
    (
        "GradientLens",
        "no loss",
        lambda _: gradient_lens_pb2.GradientLensRequest(input=prompt("Japan")),
        "loss",
    ),
    (
        "GradientLens",
        "no target",
        lambda _: gradient(nll=gradient_lens_pb2.NegativeLogLikelihood()),
        "nll.target",
    ),
    (
        "GradientLens",
        "preferred of several tokens",
        lambda _: gradient(
            logit_difference=gradient_lens_pb2.LogitDifference(
                preferred=Target(text=" Paris Tokyo"), other=PARIS
            )
        ),
        "logit_difference.preferred",
    ),
    (
        "GradientLens",
        "nothing suppressed",
        lambda _: gradient(kl=gradient_lens_pb2.KlDivergence()),
        "kl.suppressed.ids",
    ),
    (
        "GradientLens",
        "everything suppressed",
        lambda m: gradient(
            kl=gradient_lens_pb2.KlDivergence(suppressed=TokenIds(ids=range(m.vocab_size)))
        ),
        "kl.suppressed.ids",
    ),
    (
        "GradientLens",
        "suppressed text of several tokens",
        lambda _: gradient(
            kl=gradient_lens_pb2.KlDivergence(tokens=[PARIS, Target(text=" Paris Tokyo")])
        ),
        "kl.tokens[1]",
    ),
    ("GradientLens", "kind unknown", lambda _: gradient(matrices=[2, 99]), "matrices[1]"),
    (
        "GradientLens",
        "no such kind",
        lambda _: gradient(matrices=[gradient_lens_pb2.MATRIX_KIND_GATE]),
        "matrices",
    ),
    (
        "GradientLens",
        "forced target leaves no room",
        lambda m: gradient(
            input=token_ids(*[5] * m.max_positions),
            nll=gradient_lens_pb2.NegativeLogLikelihood(
                target=Target(token_ids=TokenIds(ids=[5, 5]))
            ),
        ),
        "input.token_ids.ids",
    ),
    (
        "GradientLens",
        "learning rate",
        lambda _: gradient(learning_rate=float("nan")),
        "learning_rate",
    ),
]

OTHER: list[Case] = [
    ("Tokenize", "empty text", lambda _: models_pb2.TokenizeRequest(), "text"),
    (
        "ListModels",
        "page token",
        lambda _: models_pb2.ListModelsRequest(page_token="9" * 5000),
        "page_token",
    ),
    ("Project", "no vectors", lambda _: project(common_pb2.Tensor()), "vectors.data_type"),
    ("Project", "width", lambda m: project(vectors(2, m.d_model + 1)), "vectors.shape"),
    ("Project", "rank", lambda m: project(vectors(1, 1, m.d_model)), "vectors.shape"),
    ("Project", "negative", lambda _: project(vectors(1, shape=[-1])), "vectors.shape"),
    ("Project", "length", lambda m: project(vectors(m.d_model, data=b"abc")), "vectors.data"),
    ("Project", "type", lambda m: project(vectors(m.d_model, data_type=4)), "vectors.data_type"),
    (
        "Project",
        "not finite",
        lambda m: project(vectors(m.d_model, value=float("inf"))),
        "vectors.data",
    ),
    ("Project", "too many", lambda m: project(vectors(4097, m.d_model)), "vectors"),
    (
        "Project",
        "too many tokens",
        lambda m: project(vectors(500, m.d_model), top_k=1000),
        "vectors",
    ),
    ("FindNeurons", "no token", lambda _: neurons(), "token"),
    ("FindNeurons", "token unset", lambda _: neurons(token=Target()), "token"),
    ("FindNeurons", "token empty", lambda _: neurons(token=Target(text="")), "token"),
    (
        "FindNeurons",
        "token id",
        lambda m: neurons(token=Target(token_ids=TokenIds(ids=[m.vocab_size]))),
        "token.token_ids.ids[0]",
    ),
    ("FindNeurons", "layer", lambda m: neurons(token=PARIS, layers=[m.n_layers]), "layers"),
    (
        "PreviewEdit",
        "no edit",
        lambda _: edits_pb2.PreviewEditRequest(input=prompt("Japan"), target=PARIS),
        "edit",
    ),
]

CASES = [
    *inputs("Trace", trace),
    *inputs("GradientLens", gradient),
    *TRACE,
    *GRADIENT,
    *OTHER,
]

# The advice in errors that cannot give a range of values.
REMEDIES = "(leave|remove|request|send|set|shorten|use)"


@pytest.mark.parametrize(
    ("method", "request_of", "field"),
    [(method, request, field) for method, _, request, field in CASES],
    ids=[f"{method}: {name}" for method, name, _, _ in CASES],
)
def test_is_refused_by_field(
    channel: grpc.Channel,
    demo: Model,
    method: str,
    request_of: Callable[[Model], Message],
    field: str,
) -> None:
    refusal = refused(channel, method, request_of(demo))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT, refusal.text
    assert refusal.reason == "INVALID_REQUEST"
    assert refusal.info.domain == "januslens"
    assert refusal.fields == [field]
    assert refusal.retry_after is None
    assert re.match(rf"{re.escape(field)}: (?!expected).*(expected|; {REMEDIES} )", refusal.text)


def test_a_target_of_several_tokens_is_refused_with_their_list(channel: grpc.Channel) -> None:
    refusal = refused(channel, "Trace", trace(target=Target(text=" Paris Tokyo")))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == ["target"]
    assert "2 tokens given (" in refusal.text
    assert "' Paris'" in refusal.text
    assert "' Tokyo'" in refusal.text


SEVERAL = Target(text=" Paris Tokyo")
SHIFT = edits_pb2.ForwardShift(layer=1, eta=0.1)
STEP = edits_pb2.DescentStep(learning_rate=0.1)


@pytest.mark.parametrize(
    ("fields", "refused_field"),
    [
        ({"target": SEVERAL, "shift": SHIFT}, "target"),
        (
            {
                "target": PARIS,
                "descent": STEP,
                "probes": [edits_pb2.Probe(input=prompt("Japan"), target=SEVERAL)],
            },
            "probes[0].target",
        ),
    ],
    ids=["shift", "probe"],
)
def test_an_edit_never_takes_the_first_of_several_tokens_silently(
    channel: grpc.Channel, fields: dict[str, Any], refused_field: str
) -> None:
    request = edits_pb2.PreviewEditRequest(input=prompt("Japan"), **fields)
    refusal = refused(channel, "PreviewEdit", request)
    assert refusal.fields == [refused_field]
    assert "2 tokens given (" in refusal.text


@pytest.mark.parametrize(
    ("method", "request_of", "fields"),
    [
        (
            "Trace",
            lambda m: trace(target=SEVERAL, layers=[m.n_layers], other=SEVERAL),
            ["layers", "target", "other"],
        ),
        (
            "Trace",
            lambda _: trace(positions=[99], targets_at=[{"position": 98, "target": PARIS}]),
            ["positions", "targets_at[0].position"],
        ),
        (
            "GradientLens",
            lambda m: gradient(layers=[m.n_layers], input=token_ids(m.vocab_size)),
            ["input.token_ids.ids[0]", "layers"],
        ),
        (
            "FindNeurons",
            lambda m: neurons(token=SEVERAL, layers=[m.n_layers]),
            ["token", "layers"],
        ),
        (
            "PreviewEdit",
            lambda m: edits_pb2.PreviewEditRequest(
                input=prompt("Japan"),
                target=SEVERAL,
                shift=edits_pb2.ForwardShift(layer=m.n_layers, eta=1),
            ),
            ["target", "shift.layer"],
        ),
    ],
    ids=["Trace", "Trace: positions", "GradientLens", "FindNeurons", "PreviewEdit"],
)
def test_independent_invalid_fields_are_reported_together(
    channel: grpc.Channel,
    demo: Model,
    method: str,
    request_of: Callable[[Model], Message],
    fields: list[str],
) -> None:
    refusal = refused(channel, method, request_of(demo))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == fields
    assert all(f"{field}: " in refusal.text for field in fields)


@pytest.mark.parametrize("word", [" Paris", " Zürich", "鷗"])
def test_a_refusal_that_quotes_megabytes_still_arrives(channel: grpc.Channel, word: str) -> None:
    """Clients drop a status whose metadata exceeds their limit, and lose its details."""
    subject = gradient_lens_pb2.Subject(text=word * 5_000)
    refusal = refused(channel, "GradientLens", gradient(subject=subject))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == ["subject.text"]
    assert refusal.text.endswith(" ...")
    longest = word * (256 // len(word.encode()))
    refusal = refused(channel, "Tokenize", models_pb2.TokenizeRequest(model=longest))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
    assert refusal.reason == "MODEL_NOT_FOUND"

"""The server answers every request or returns a clear error, and stays healthy."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from januslens.v1 import (
    activations_pb2,
    common_pb2,
    edits_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    interventions_pb2,
    lens_pb2,
    models_pb2,
    trace_pb2,
)
from tests.support.calls import methods, refusal, started

MessageT = TypeVar("MessageT", bound=Message)
Fields = dict[str, st.SearchStrategy[Any]]

ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

VOCABULARY = 982
D_MODEL = 128


def message(
    kind: type[MessageT], needed: Fields | None = None, /, **fields: st.SearchStrategy[Any]
) -> st.SearchStrategy[MessageT]:
    """Return messages with the `needed` fields and any subset of the others."""
    return st.fixed_dictionaries(needed or {}, optional=fields).map(lambda chosen: kind(**chosen))


def often(usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw mostly valid values; otherwise every example would end at its first field."""
    return st.integers(0, 29).flatmap(lambda n: usual if n else rare)


UINT32 = st.integers(0, 2**32 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
IDS = st.lists(often(st.integers(0, VOCABULARY - 1), UINT32), min_size=1, max_size=6)
TOKEN_IDS = message(common_pb2.TokenIds, {"ids": IDS})
LAYERS = st.lists(often(st.integers(-3, 3), INT32), max_size=3)
COUNT = often(st.integers(0, 20), UINT32)
NUMBER = st.floats(width=32)
STEP = often(st.floats(-1, 1, width=32), NUMBER)

MODEL = often(st.sampled_from(["", "demo"]), TEXT)
REVISION = often(st.just(""), TEXT)
INPUT = often(
    st.one_of(
        st.builds(lambda text: common_pb2.Input(prompt=text), TEXT.map("Japan".__add__)),
        st.builds(lambda ids: common_pb2.Input(token_ids=ids), TOKEN_IDS),
    ),
    message(common_pb2.Input, prompt=TEXT),
)
TARGET = often(
    st.integers(0, VOCABULARY - 1).map(
        lambda i: common_pb2.Target(token_ids=common_pb2.TokenIds(ids=[i]))
    ),
    message(common_pb2.Target, token_ids=TOKEN_IDS) | message(common_pb2.Target, text=TEXT),
)
LENS = often(st.integers(0, 3), INT32)
READING = {"top_k": COUNT, "bottom_k": COUNT, "lens": LENS}
MATRICES = st.lists(often(st.integers(1, 8), st.integers(-1, 99)), max_size=4)

TRACES = message(
    trace_pb2.TraceRequest,
    {"input": INPUT},
    model=MODEL,
    revision=REVISION,
    target=TARGET,
    layers=LAYERS,
    positions=st.lists(often(st.integers(-3, 2), st.integers(-(2**31), 2**31 - 1)), max_size=3),
    all_positions=st.booleans(),
    selection=message(
        trace_pb2.Selection,
        heads=COUNT,
        memory_values_per_head=COUNT,
        top_neurons=often(st.integers(1, 20), UINT32),
        bottom_neurons=COUNT,
        by=often(st.integers(0, 3), st.integers(-1, 9)),
    ),
    node_kinds=st.lists(often(st.integers(1, 28), st.integers(-1, 99)), max_size=4),
    include_vectors=st.booleans(),
    include_logit_contribution=st.booleans(),
    include_attribution=st.booleans(),
    include_gradients=st.booleans(),
    other=TARGET,
    overlap_k=COUNT,
    **READING,
)

LOSSES: Fields = {
    "nll": message(gradient_lens_pb2.NegativeLogLikelihood, {"target": TARGET}),
    "logit_difference": message(
        gradient_lens_pb2.LogitDifference, {"preferred": TARGET, "other": TARGET}
    ),
    "kl": message(
        gradient_lens_pb2.KlDivergence,
        {"suppressed": TOKEN_IDS},
        tokens=st.lists(TARGET, max_size=2),
    ),
}

SUBJECT = st.one_of(
    message(gradient_lens_pb2.Subject, {"text": often(st.sampled_from(["J", "Japan"]), TEXT)}),
    message(
        gradient_lens_pb2.Subject,
        {"span": message(gradient_lens_pb2.Span, {"end": st.integers(1, 3)}, start=COUNT)},
    ),
)


def gradients(name: str) -> st.SearchStrategy[Message]:
    return message(
        gradient_lens_pb2.GradientLensRequest,
        {"input": INPUT, name: LOSSES[name]},
        model=MODEL,
        revision=REVISION,
        matrices=MATRICES,
        layers=LAYERS,
        components=COUNT,
        spectrum_rank=COUNT,
        neurons=COUNT,
        learning_rate=STEP,
        subject=SUBJECT,
        include_factors=st.booleans(),
        verify=st.booleans(),
        **READING,
    )


def vectors_of(values: list[float]) -> common_pb2.Tensor:
    """Return vectors of the right width that repeat a few arbitrary values."""
    repeated = [values[i % len(values)] for i in range(2 * D_MODEL)]
    return common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32,
        shape=[2, D_MODEL],
        data=struct.pack(f"<{len(repeated)}f", *repeated),
    )


TENSORS = often(
    st.lists(NUMBER, min_size=1, max_size=5).map(vectors_of),
    message(
        common_pb2.Tensor,
        data_type=st.integers(-1, 9),
        shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=4),
        data=st.binary(max_size=64),
    ),
)

PROJECTS = message(
    lens_pb2.ProjectRequest, {"vectors": TENSORS}, model=MODEL, target=TARGET, **READING
)

NEAR = st.lists(st.integers(-3, 2), max_size=2)
INTERVENTION = st.sampled_from(
    [
        {"zero": st.just(True)},
        {"scale": STEP},
        {"set": TENSORS},
        {"add": message(interventions_pb2.Addition, {"vector": TENSORS}, coefficient=STEP)},
        {"patch": message(interventions_pb2.Patch, {"input": INPUT}, positions=NEAR)},
        {"mean_over": message(interventions_pb2.MeanOver, inputs=st.lists(INPUT, max_size=2))},
        {"noise": message(interventions_pb2.Noise, standard_deviation=STEP, seed=UINT32)},
        {"block": st.just(True)},
    ]
).flatmap(
    lambda operation: message(
        interventions_pb2.Intervention,
        {"site": often(st.integers(1, 16), st.integers(-1, 30)), **operation},
        layers=LAYERS,
        positions=NEAR,
        heads=st.lists(often(st.integers(0, 3), UINT32), max_size=2),
        neurons=st.lists(COUNT, max_size=2),
        source_positions=NEAR,
    )
)
INTERVENTIONS = st.lists(INTERVENTION, max_size=2)

# Most of any interventions fit no prompt, so that an experiment also draws from those that do.
FITTING = message(
    interventions_pb2.Intervention,
    {"site": st.sampled_from([7, 8, 9, 11, 13, 14]), "scale": st.floats(-1, 1, width=32)},
    layers=st.lists(st.integers(-3, 3), max_size=2, unique_by=lambda layer: layer % 4),
    positions=st.sampled_from([[], [-1], [0]]),
)
EXPERIMENT = message(
    intervene_pb2.Experiment,
    {"interventions": st.lists(often(FITTING, INTERVENTION), max_size=2)},
    label=often(st.just(""), TEXT),
)
SWEEP = message(
    intervene_pb2.Sweep,
    {"template": often(FITTING, INTERVENTION), "by_layer": st.just(True)},
    by_position=st.booleans(),
    by_head=often(st.just(False), st.just(True)),
    by_source=often(st.just(False), st.just(True)),
    layer_window=often(st.integers(1, 3), UINT32),
)
CHANGES: Fields = {
    "experiments": st.lists(EXPERIMENT, min_size=1, max_size=3),
    "sweep": SWEEP,
}


def experiments(name: str) -> st.SearchStrategy[Message]:
    return message(
        intervene_pb2.InterveneRequest,
        {"input": INPUT, name: CHANGES[name]},
        model=MODEL,
        revision=REVISION,
        target=TARGET,
        other=TARGET,
        always=st.lists(often(FITTING, INTERVENTION), max_size=1),
        positions=NEAR,
        top_k=COUNT,
    )


ACTIVATIONS = message(
    activations_pb2.ActivationsRequest,
    {"input": INPUT},
    model=MODEL,
    revision=REVISION,
    sites=st.lists(often(st.integers(1, 16), st.integers(-1, 30)), min_size=1, max_size=4),
    layers=LAYERS,
    positions=NEAR,
    data_type=often(st.integers(0, 1), st.integers(-1, 9)),
    interventions=INTERVENTIONS,
    heads=st.lists(often(st.integers(0, 3), UINT32), max_size=2),
)

EDIT: Fields = {
    "descent": message(
        edits_pb2.DescentStep, {"learning_rate": STEP}, matrices=MATRICES, layers=LAYERS
    ),
    "shift": message(edits_pb2.ForwardShift, {"eta": STEP}, layer=often(st.integers(-3, 3), INT32)),
}


def edits(name: str) -> st.SearchStrategy[Message]:
    probes = message(edits_pb2.Probe, {"input": INPUT}, label=TEXT, target=TARGET)
    return message(
        edits_pb2.PreviewEditRequest,
        {"input": INPUT, "target": TARGET, name: EDIT[name]},
        model=MODEL,
        revision=REVISION,
        probes=st.lists(probes, max_size=2),
        interventions=INTERVENTIONS,
    )


TOKENIZE = message(
    models_pb2.TokenizeRequest, model=MODEL, text=TEXT, with_special_tokens=st.booleans()
)
LIST = message(models_pb2.ListModelsRequest, page_size=UINT32, page_token=TEXT)

REQUESTS: dict[str, st.SearchStrategy[Any]] = {
    "Trace": TRACES,
    "GradientLens": st.sampled_from(list(LOSSES)).flatmap(gradients),
    "Project": PROJECTS,
    "PreviewEdit": st.sampled_from(list(EDIT)).flatmap(edits),
    "Activations": ACTIVATIONS,
    "Intervene": st.sampled_from(list(CHANGES)).flatmap(experiments),
    "Tokenize": TOKENIZE,
    "ListModels": LIST,
}

# A trace costs a hundred times a projection.
EXAMPLES = dict.fromkeys(REQUESTS, 120) | {"Trace": 40, "GradientLens": 60}


@pytest.mark.parametrize("method", REQUESTS)
def test_any_request_is_served_or_refused(channel: grpc.Channel, method: str) -> None:
    served = 0

    @settings(
        max_examples=EXAMPLES[method],
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(REQUESTS[method])
    def check(request: Message) -> None:
        nonlocal served
        call = started(channel, method, request, timeout=60)
        messages = answer(call, method)
        assert call.code() in ANSWERS, call.details()
        if call.code() is grpc.StatusCode.OK:
            served += 1
            assert all(math.isfinite(value) for message in messages for value in floats(message))
        else:
            found = refusal(call)
            assert found.info.domain == "januslens"
            assert (found.code is grpc.StatusCode.INVALID_ARGUMENT) == bool(found.fields)

    check()
    assert served > 10, "too few of the requests were served for this test to say much"
    health: Any = health_pb2_grpc.HealthStub(channel)
    ready = health.Check(health_pb2.HealthCheckRequest(service="januslens.ready"))
    assert ready.status == health_pb2.HealthCheckResponse.SERVING


def answer(call: Any, method: str) -> list[Message]:
    """Return the responses received before the call's status."""
    if not methods()[method].server_streaming:
        return [] if call.exception() else [call.result()]
    try:
        return list(call)
    except grpc.RpcError:
        return []


def floats(message: Message) -> Iterator[float]:
    """Return every floating-point number of a message, at any depth."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None:
            for inner in values:
                yield from floats(inner)
        elif field.cpp_type in {field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE}:
            yield from values

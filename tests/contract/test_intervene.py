"""Intervene over the wire: order, texts, estimates and invalid requests."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from januslens.v1 import (
    common_pb2,
    cost_pb2,
    intervene_pb2,
    interventions_pb2,
    models_pb2,
    service_pb2_grpc,
    sites_pb2,
)
from tests.support.calls import prompt, refused, timeless

Stub = service_pb2_grpc.IntrospectionServiceStub
Request = intervene_pb2.InterveneRequest
JAPAN = prompt("The capital of Japan is the city of")
HIDE_ALL = interventions_pb2.Intervention(
    site=sites_pb2.SITE_ATTENTION_PATTERN, block=True, positions=[-1], source_positions=range(8)
)
HEADS = interventions_pb2.Intervention(site=sites_pb2.SITE_HEAD_RESULT, zero=True)


def sweep(template: interventions_pb2.Intervention = HEADS, **axes: Any) -> intervene_pb2.Sweep:
    return intervene_pb2.Sweep(template=template, **axes)


def test_a_sweep_over_heads_has_an_effect_for_each(stub: Stub, demo: models_pb2.Model) -> None:
    request = Request(
        input=JAPAN,
        target=common_pb2.Target(text=" Tokyo"),
        other=common_pb2.Target(text=" Paris"),
        sweep=sweep(by_layer=True, by_head=True),
        top_k=3,
    )
    stream = list(stub.Intervene(request))
    assert [message.sequence for message in stream] == list(range(len(stream)))
    header, summary = stream[0].header, stream[-1].summary
    effects = [message.effect for message in stream[1:-1]]
    count = demo.n_layers * demo.n_heads
    assert header.experiments == summary.messages == len(effects) == count
    assert {(e.layer, e.head) for e in effects} == {
        (layer, head) for layer in range(demo.n_layers) for head in range(demo.n_heads)
    }
    named = {token.id for message in stream for token in message.tokens}
    named |= {token.id for token in header.prompt_tokens}
    assert len(header.before) == 1
    for effect in effects:
        (outcome,) = effect.after
        assert outcome.HasField("logit_difference")
        assert outcome.kl_nats > 0
        assert len(outcome.top_token_ids) == 3
        assert named >= {outcome.target_token_id, *outcome.top_token_ids}
    again = [timeless(message) for message in stub.Intervene(request)]
    assert again == [timeless(message) for message in stream]


def test_a_sweep_by_source_may_cover_every_source(stub: Stub) -> None:
    stream = list(stub.Intervene(Request(input=JAPAN, sweep=sweep(HIDE_ALL, by_source=True))))
    places = {message.effect.source_position for message in stream[1:-1]}
    assert places == set(range(8))


def test_estimate_bounds_the_stream(stub: Stub) -> None:
    request = Request(input=JAPAN, sweep=sweep(by_layer=True, by_head=True, by_position=True))
    estimate = stub.EstimateCost(cost_pb2.EstimateCostRequest(intervene=request))
    sent = sum(message.ByteSize() for message in stub.Intervene(request))
    assert sent <= estimate.stream_bytes < 8 * sent
    assert estimate.admissible


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "experiments"),
        ({"sweep": intervene_pb2.Sweep()}, "sweep.template.site"),
        ({"sweep": sweep(layer_window=0)}, "sweep.layer_window"),
        ({"sweep": sweep(by_source=True)}, "sweep.by_source"),
        ({"sweep": sweep(HIDE_ALL, by_layer=True)}, "sweep.template.source_positions"),
        ({"sweep": sweep(), "top_k": 101}, "top_k"),
        ({"sweep": sweep(), "positions": [99]}, "positions"),
        ({"sweep": sweep(), "target": common_pb2.Target(text="one two three four")}, "target"),
        ({"sweep": sweep(), "always": [interventions_pb2.Intervention()]}, "always[0].site"),
        ({"experiments": [intervene_pb2.Experiment()] * 16_385}, "experiments"),
        (
            {
                "experiments": [intervene_pb2.Experiment(label="x" * 5000)],
                "sweep": sweep(),
            },
            "experiments[0].label",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_requests_are_named(
    channel: grpc.Channel, fields: dict[str, Any], path: str
) -> None:
    request = Request(input=JAPAN, **fields)
    answer = refused(channel, "Intervene", request)
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.fields == [path]

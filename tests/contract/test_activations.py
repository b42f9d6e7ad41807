"""Activations over the wire: pieces, data types, limits and invalid requests."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from januslens.v1 import (
    activations_pb2,
    common_pb2,
    cost_pb2,
    models_pb2,
    service_pb2_grpc,
    sites_pb2,
)
from tests.support.calls import prompt, refused, timeless, token_ids

Stub = service_pb2_grpc.IntrospectionServiceStub
Request = activations_pb2.ActivationsRequest
LONG = token_ids(*range(300, 390))


def values(stream: list[activations_pb2.ActivationsResponse]) -> dict[tuple[int, int], np.ndarray]:
    """The float32 tensors of a stream by site and layer, after checks of their pieces."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for message in stream[1:-1]:
        tensor = message.tensor
        layer = tensor.layer if tensor.HasField("layer") else -1
        flat = found.setdefault((tensor.site, layer), np.empty(0, "<f4"))
        assert tensor.offset == len(flat)
        piece = np.frombuffer(tensor.piece.data, "<f4")
        assert list(tensor.piece.shape) == [len(piece)]
        found[tensor.site, layer] = np.concatenate([flat, piece])
        shape = tensor.shape
        if len(found[tensor.site, layer]) == np.prod(shape):
            found[tensor.site, layer] = found[tensor.site, layer].reshape(shape)
    return found


def test_stream_has_header_tensors_and_summary(stub: Stub, demo: models_pb2.Model) -> None:
    request = Request(
        input=prompt("The capital of Japan"),
        sites=[sites_pb2.SITE_HEAD_RESULT, sites_pb2.SITE_EMBEDDING],
        positions=[-1, 0],
    )
    stream = list(stub.Activations(request))
    assert [message.sequence for message in stream] == list(range(len(stream)))
    header, summary = stream[0].header, stream[-1].summary
    assert header.positions == [0, len(header.prompt_tokens) - 1]
    assert header.request_id
    assert header.provenance.model == demo.name
    assert summary.messages == len(stream) - 2 == demo.n_layers + 1
    assert {time.stage for time in summary.times} >= {"tokenize", "forward", "copy"}
    found = values(stream)
    assert list(found) == [
        (sites_pb2.SITE_EMBEDDING, -1),
        *((sites_pb2.SITE_HEAD_RESULT, layer) for layer in range(demo.n_layers)),
    ]
    assert found[sites_pb2.SITE_HEAD_RESULT, 0].shape == (2, demo.n_heads, demo.d_head)


def test_logits_of_one_position_equal_those_of_all(stub: Stub, demo: models_pb2.Model) -> None:
    (logits,) = values(
        list(stub.Activations(Request(input=LONG, sites=[sites_pb2.SITE_LOGITS])))
    ).values()
    assert logits.shape == (90, demo.vocab_size)
    alone = Request(input=LONG, sites=[sites_pb2.SITE_LOGITS], positions=[-1])
    (last,) = values(list(stub.Activations(alone))).values()
    np.testing.assert_allclose(last, logits[-1:], rtol=1e-4, atol=1e-5)


def test_equal_requests_have_equal_bytes(stub: Stub) -> None:
    request = Request(
        input=prompt("Japan"), sites=[sites_pb2.SITE_NEURONS, sites_pb2.SITE_ATTENTION_PATTERN]
    )
    first, second = ([timeless(m) for m in stub.Activations(request)] for _ in range(2))
    assert first == second


def test_estimate_bounds_the_stream(stub: Stub) -> None:
    sites = [sites_pb2.SITE_ATTENTION_PATTERN, sites_pb2.SITE_NEURONS, sites_pb2.SITE_LOGITS]
    request = Request(input=LONG, sites=sites)
    estimate = stub.EstimateCost(cost_pb2.EstimateCostRequest(activations=request))
    sent = sum(message.ByteSize() for message in stub.Activations(request))
    assert sent <= estimate.stream_bytes < 1.2 * sent
    assert estimate.admissible
    assert min(estimate.flops, estimate.device_bytes, estimate.seconds) > 0


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "sites"),
        ({"sites": [0]}, "sites[0]"),
        ({"sites": [1, 99]}, "sites[1]"),
        ({"sites": [sites_pb2.SITE_ROUTER]}, "sites[0]"),
        ({"sites": [1], "layers": [99]}, "layers"),
        ({"sites": [1], "positions": [99]}, "positions"),
        ({"sites": [1], "heads": [0]}, "heads"),
        ({"sites": [sites_pb2.SITE_QUERY], "heads": [2**31]}, "heads"),
        ({"sites": [1], "data_type": common_pb2.DATA_TYPE_INT64}, "data_type"),
    ],
    ids=str,
)
def test_invalid_fields_are_named(channel: grpc.Channel, fields: dict[str, Any], path: str) -> None:
    request = Request(input=prompt("Japan"), **fields)
    answer = refused(channel, "Activations", request)
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.fields == [path]
    estimated = cost_pb2.EstimateCostRequest(activations=request)
    assert refused(channel, "EstimateCost", estimated).text == answer.text

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
    interventions_pb2,
    models_pb2,
    service_pb2_grpc,
    sites_pb2,
    trace_pb2,
)
from tests.support.calls import prompt, refused, timeless, token_ids

Stub = service_pb2_grpc.IntrospectionServiceStub
Request = activations_pb2.ActivationsRequest
LONG = token_ids(*range(300, 390))


def values(stream: list[activations_pb2.ActivationsResponse]) -> dict[tuple[int, int], np.ndarray]:
    """Return the float32 tensors of a stream by site and layer, after checking their pieces."""
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


def tensor(*values: float, shape: list[int] | None = None) -> common_pb2.Tensor:
    return common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32,
        shape=[len(values)] if shape is None else shape,
        data=np.array(values, "<f4").tobytes(),
    )


JAPAN = prompt("The capital of Japan is the city of")
OPERATIONS: dict[str, Any] = {
    "zero": True,
    "scale": 0.5,
    "set": tensor(*[1.0] * 128),
    "add": interventions_pb2.Addition(vector=tensor(*[1.0] * 128), coefficient=2.0),
    "patch": interventions_pb2.Patch(input=prompt("The capital of Peru is the city of")),
    "mean_over": interventions_pb2.MeanOver(inputs=[prompt("Japan is"), prompt("Peru is the")]),
    "noise": interventions_pb2.Noise(standard_deviation=1.0, seed=3),
    "block": True,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_changes_the_logits(stub: Stub, operation: str) -> None:
    where = {"positions": [-1], "source_positions": [1]} if operation == "block" else {}
    pattern, stream = sites_pb2.SITE_ATTENTION_PATTERN, sites_pb2.SITE_BLOCK_OUTPUT
    change = interventions_pb2.Intervention(
        site=pattern if operation == "block" else stream,
        layers=[1],
        **where | {operation: OPERATIONS[operation]},
    )
    request = Request(input=JAPAN, sites=[sites_pb2.SITE_LOGITS], positions=[-1])
    before = values(list(stub.Activations(request)))
    request.interventions.add().CopyFrom(change)
    after = values(list(stub.Activations(request)))
    again = values(list(stub.Activations(request)))
    (key,) = before
    assert not np.array_equal(before[key], after[key])
    np.testing.assert_array_equal(after[key], again[key])


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, ""),
        ({"zero": False}, ".zero"),
        ({"site": 99, "zero": True}, ".site"),
        ({"scale": float("nan")}, ".scale"),
        ({"set": tensor(1.0, shape=[2**40, 2**40])}, ".set.data"),
        ({"set": tensor(1.0, shape=[-1])}, ".set.shape"),
        ({"set": tensor(1.0, shape=[])}, ".set.shape"),
        ({"set": tensor(*[float("inf")] * 128)}, ".set.data"),
        ({"set": tensor(1.0)}, ".set.shape"),
        ({"add": interventions_pb2.Addition(vector=tensor(float("nan")))}, ".add.vector.data"),
        (
            {"add": interventions_pb2.Addition(coefficient=float("inf"), vector=tensor(1.0))},
            ".add.coefficient",
        ),
        ({"noise": interventions_pb2.Noise(standard_deviation=-1.0)}, ".noise.standard_deviation"),
        ({"patch": interventions_pb2.Patch()}, ".patch.input"),
        ({"patch": interventions_pb2.Patch(input=prompt("Japan"))}, ".patch.input"),
        ({"mean_over": interventions_pb2.MeanOver()}, ".mean_over.inputs"),
        (
            {"site": sites_pb2.SITE_ATTENTION_PATTERN, "block": True},
            ".source_positions",
        ),
    ],
    ids=str,
)
def test_invalid_interventions_are_named(
    channel: grpc.Channel, fields: dict[str, Any], path: str
) -> None:
    whole: dict[str, Any] = {"site": sites_pb2.SITE_BLOCK_OUTPUT} | fields
    change = interventions_pb2.Intervention(**whole)
    request = trace_pb2.TraceRequest(input=JAPAN, interventions=[change])
    answer = refused(channel, "Trace", request)
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.fields == [f"interventions[0]{path}"]

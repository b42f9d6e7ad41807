"""EstimateCost: the cost of a request, and the same errors as from the request itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import grpc
import pytest

from januslens import Client, LimitExceeded
from januslens.v1 import cost_pb2, gradient_lens_pb2, service_pb2_grpc, trace_pb2
from tests.support.calls import long_trace, prompt, refused, token_ids
from tests.support.server import ServerProcess, running_server

Stub = service_pb2_grpc.IntrospectionServiceStub
SHORT = trace_pb2.TraceRequest(input=prompt("The capital of Japan"))
NO_TARGET = gradient_lens_pb2.GradientLensRequest(input=prompt("Japan"))


def estimate(
    stub: Stub, request: trace_pb2.TraceRequest | gradient_lens_pb2.GradientLensRequest
) -> cost_pb2.EstimateCostResponse:
    return stub.EstimateCost(enclosed(request))


def enclosed(
    request: trace_pb2.TraceRequest | gradient_lens_pb2.GradientLensRequest,
) -> cost_pb2.EstimateCostRequest:
    if isinstance(request, trace_pb2.TraceRequest):
        return cost_pb2.EstimateCostRequest(trace=request)
    return cost_pb2.EstimateCostRequest(gradient_lens=request)


def test_a_usual_request_is_admissible(stub: Stub) -> None:
    found = estimate(stub, SHORT)
    assert (found.admissible, list(found.exceeded)) == (True, [])
    assert 0 < found.seconds < 60
    sent = sum(message.ByteSize() for message in stub.Trace(SHORT))
    assert sent <= found.stream_bytes < 5 * sent
    assert min(found.projected_vectors, found.flops, found.device_bytes) > 0


def test_larger_requests_have_larger_estimates(stub: Stub) -> None:
    small, large = estimate(stub, SHORT), estimate(stub, long_trace(40))
    for field in ("seconds", "projected_vectors", "flops", "device_bytes", "stream_bytes"):
        assert getattr(large, field) > getattr(small, field)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (trace_pb2.TraceRequest(model="nobody"), "MODEL_NOT_FOUND"),
        (trace_pb2.TraceRequest(revision="other"), "REVISION_NOT_FOUND"),
        (trace_pb2.TraceRequest(), "INVALID_REQUEST"),
        (trace_pb2.TraceRequest(input=token_ids(5000)), "INVALID_REQUEST"),
        (trace_pb2.TraceRequest(input=prompt("Japan"), layers=[99]), "INVALID_REQUEST"),
        (trace_pb2.TraceRequest(input=prompt("Japan"), positions=[99]), "INVALID_REQUEST"),
        (NO_TARGET, "INVALID_REQUEST"),
    ],
    ids=lambda value: str(value).replace("\n", " ")[:30],
)
def test_invalid_requests_get_the_same_errors_as_when_run(
    channel: grpc.Channel,
    request_: trace_pb2.TraceRequest | gradient_lens_pb2.GradientLensRequest,
    reason: str,
) -> None:
    method = "Trace" if isinstance(request_, trace_pb2.TraceRequest) else "GradientLens"
    asked = refused(channel, "EstimateCost", enclosed(request_))
    itself = refused(channel, method, request_)
    assert asked.reason == itself.reason == reason
    assert (asked.code, asked.text, asked.fields) == (itself.code, itself.text, itself.fields)


def test_an_empty_estimate_names_what_is_missing(channel: grpc.Channel) -> None:
    answer = refused(channel, "EstimateCost", cost_pb2.EstimateCostRequest())
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.fields == ["request"]


@dataclass(frozen=True)
class LowLimit:
    """A limit that a long trace exceeds: its setting, its figure, and its part of the message."""

    setting: str
    allowed: float
    text: str


SECONDS = LowLimit("0.01", 0.01, "limit 0.01 s of device time (max_request_seconds)")
MEMORY = LowLimit("20MiB", 20 * 2**20, "limit 20.0 MiB on the device (max_request_memory)")
STREAM = LowLimit("10MB", 10**7, "limit 9.5 MiB for the response (max_request_stream)")
LIMITED = [
    {"max_request_seconds": SECONDS},
    {"max_request_memory": MEMORY, "max_request_stream": STREAM},
]


@pytest.fixture(scope="module", params=LIMITED, ids=" ".join)
def limited(request: pytest.FixtureRequest) -> Iterator[tuple[ServerProcess, dict[str, LowLimit]]]:
    """A server with low limits, and the limits."""
    limits: dict[str, LowLimit] = request.param
    flags = [(f"--{name.replace('_', '-')}", limit.setting) for name, limit in limits.items()]
    with running_server(*chain.from_iterable(flags)) as server:
        yield server, limits


def test_request_over_limits_is_refused_with_both_figures_of_each(
    limited: tuple[ServerProcess, dict[str, LowLimit]],
) -> None:
    server, limits = limited
    with grpc.insecure_channel(server.address) as channel:
        answer = refused(channel, "Trace", long_trace(20))
        found = estimate(Stub(channel), long_trace(20))
        outputs = [trace_pb2.NODE_KIND_BLOCK_OUTPUT]
        cheap = trace_pb2.TraceRequest(input=prompt("x"), layers=[0], node_kinds=outputs)
        if "max_request_seconds" not in limits:  # how fast this machine is, no test can know
            assert list(Stub(channel).Trace(cheap))[-1].HasField("summary")
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (answer.reason, answer.info.domain) == ("LIMIT_EXCEEDED", "januslens")
    assert answer.retry_after is None  # asking again would not help
    for limit in limits.values():
        assert limit.text in answer.text
    if "max_request_stream" in limits:
        assert f"estimated at up to {found.stream_bytes / 2**20:.1f} MiB, limit" in answer.text
    assert not found.admissible
    details = answer.detail(cost_pb2.LimitViolations)
    assert details is not None
    for violations in (found.exceeded, details.violations):
        names = [cost_pb2.CostLimit.Name(violation.limit) for violation in violations]
        assert names == [f"COST_LIMIT_{name.upper()}" for name in limits]
        for violation, limit in zip(violations, limits.values(), strict=True):
            assert violation.allowed == limit.allowed < violation.estimated


def test_the_client_names_every_exceeded_limit(
    limited: tuple[ServerProcess, dict[str, LowLimit]],
) -> None:
    server, limits = limited
    # As `long_trace`.
    prompt_ids = range(300, 320)
    everything: dict[str, Any] = {"heads": 0, "memory_values": 0, "top_neurons": 0}
    with Client(server.address) as client:
        found = client.estimate_trace(prompt_ids, positions="all", vectors=True, **everything)
        assert [violation.limit for violation in found.exceeded] == list(limits)
        with pytest.raises(LimitExceeded, match=".*".join(limits)) as caught:
            client.trace(prompt_ids, positions="all", vectors=True, **everything)
    allowed = [limit.allowed for limit in limits.values()]
    assert [v.allowed for v in caught.value.limit_violations] == allowed

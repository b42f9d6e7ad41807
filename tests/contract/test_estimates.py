"""EstimateCost: the cost of a request, and the same errors as from the request itself."""

from __future__ import annotations

from collections.abc import Iterator

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


TIGHT = {
    "max_request_seconds": "0.01",
    "max_request_memory": "20MiB",
    "max_request_stream": "10MB",
}
ALLOWED = {
    "max_request_seconds": 0.01,
    "max_request_memory": 20 * 2**20,
    "max_request_stream": 10**7,
}


@pytest.fixture(scope="module", params=TIGHT)
def limited(request: pytest.FixtureRequest) -> Iterator[tuple[ServerProcess, str]]:
    """A server with one low limit, and the name of the limit."""
    limit = request.param
    with running_server(f"--{limit.replace('_', '-')}", TIGHT[limit]) as server:
        yield server, limit


def test_request_over_a_limit_is_refused_with_both_figures(
    limited: tuple[ServerProcess, str],
) -> None:
    server, limit = limited
    with grpc.insecure_channel(server.address) as channel:
        answer = refused(channel, "Trace", long_trace(20))
        found = estimate(Stub(channel), long_trace(20))
        outputs = [trace_pb2.NODE_KIND_BLOCK_OUTPUT]
        cheap = trace_pb2.TraceRequest(input=prompt("x"), layers=[0], node_kinds=outputs)
        if limit != "max_request_seconds":  # how fast this machine is, no test can know
            assert list(Stub(channel).Trace(cheap))[-1].HasField("summary")
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (answer.reason, answer.info.domain) == ("LIMIT_EXCEEDED", "januslens")
    assert answer.retry_after is None  # asking again would not help
    shown = {
        "max_request_seconds": f"limit 0.01 s of device time ({limit});",
        "max_request_memory": f"limit 20.0 MiB on the device ({limit});",
        "max_request_stream": f"limit 9.5 MiB for the response ({limit});",
    }
    assert shown[limit] in answer.text
    if limit == "max_request_stream":
        assert f"estimated at up to {found.stream_bytes / 2**20:.1f} MiB, limit" in answer.text
    assert not found.admissible
    (violation,) = found.exceeded
    assert cost_pb2.CostLimit.Name(violation.limit) == f"COST_LIMIT_{limit.upper()}"
    assert violation.allowed == ALLOWED[limit] < violation.estimated
    details = answer.detail(cost_pb2.LimitViolations)
    assert details is not None
    assert [v.limit for v in details.violations] == [violation.limit]


def test_a_request_over_several_limits_is_refused_with_all_of_them() -> None:
    flags = ("--max-request-stream", "1KiB", "--max-request-memory", "1KiB")
    with running_server(*flags) as server, Client(server.address) as client:
        assert [v.limit for v in client.estimate_trace("a").exceeded] == [
            "max_request_memory",
            "max_request_stream",
        ]
        with pytest.raises(
            LimitExceeded, match=r"max_request_memory.*max_request_stream"
        ) as caught:
            client.trace("a")
    assert [v.allowed for v in caught.value.limit_violations] == [1024, 1024]

"""A bug of ours reaches the caller as INTERNAL with the request's id, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from torch import nn

from januslens.v1 import common_pb2, gradient_lens_pb2, service_pb2_grpc, trace_pb2
from januslens_server.demo import model_path
from januslens_server.models.loading import ModelSource
from januslens_server.models.registry import Registry
from januslens_server.pipelines.selfcheck import self_check
from januslens_server.rpc.health import Health
from januslens_server.rpc.server import build_server
from januslens_server.rpc.service import IntrospectionService
from januslens_server.rpc.streaming import DeviceStreams
from januslens_server.scheduling.worker import DeviceWorker
from tests.support.calls import Refusal, prompt, timeless

PRIVATE = "the text of an exception"
TRACE = trace_pb2.TraceRequest(input=prompt("The capital of Japan is the city of"))
NLL = gradient_lens_pb2.GradientLensRequest(
    input=TRACE.input,
    nll=gradient_lens_pb2.NegativeLogLikelihood(target=common_pb2.Target(text=" Paris")),
)


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry([ModelSource("demo", str(model_path()))], self_check, lambda _: None)
    registry.load_all()
    return registry


@pytest.fixture
def network(registry: Registry) -> nn.Module:
    return registry.get("demo").network


@pytest.fixture
async def stub(registry: Registry) -> AsyncIterator[Any]:
    """A server within the test's process, so that its model can be broken."""
    worker = DeviceWorker(max_waiting=8)
    service = IntrospectionService(registry, DeviceStreams(worker, stall_seconds=60))
    server = build_server(service, Health())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield service_pb2_grpc.IntrospectionServiceStub(channel)
    await server.stop(0)
    assert worker.wait_idle(5)


@contextmanager
def broken(module: nn.Module) -> Iterator[None]:
    """A module that raises whenever it runs."""

    def fail(*_: Any) -> None:
        raise RuntimeError(PRIVATE)

    handle = module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


async def refused(call: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    error = caught.value
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    headers = dict(await call.initial_metadata())
    return Refusal(error.code(), error.details() or "", status, headers["x-request-id"])


@pytest.mark.parametrize("method", ["Trace", "GradientLens"])
async def test_a_bug_is_internal_and_shows_its_id_alone(
    stub: Any, network: nn.Module, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = {"Trace": TRACE, "GradientLens": NLL}[method]
    before = [timeless(m) async for m in getattr(stub, method)(request)]
    with broken(network.get_submodule("transformer.h.2")), caplog.at_level(logging.ERROR):
        answer = await refused(getattr(stub, method)(request))
    assert answer.code is grpc.StatusCode.INTERNAL
    assert (answer.reason, answer.info.domain) == ("INTERNAL", "januslens")
    expected = f"internal error; give the operator this request id: {answer.request_id}"
    assert answer.text == expected
    assert PRIVATE not in str(answer.status)
    assert PRIVATE in caplog.text
    assert f"request {answer.request_id} met a bug" in caplog.text
    # Nothing of the failure stays: the next result is the one before, to the bit.
    assert hooks_of(network) == 0
    assert [timeless(m) async for m in getattr(stub, method)(request)] == before


def hooks_of(network: nn.Module) -> int:
    """Hooks that are on at this moment."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()
    )

"""An unexpected exception reaches the caller as INTERNAL with the request id only."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import grpc
import pytest

from januslens.v1 import common_pb2, gradient_lens_pb2, trace_pb2
from tests.support.calls import prompt, timeless
from tests.support.in_process import Loaded, broken, hooks_of, loaded, refused, served

PRIVATE = "the text of an exception"
TRACE = trace_pb2.TraceRequest(input=prompt("The capital of Japan is the city of"))
NLL = gradient_lens_pb2.GradientLensRequest(
    input=TRACE.input,
    nll=gradient_lens_pb2.NegativeLogLikelihood(target=common_pb2.Target(text=" Paris")),
)


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return loaded()


def fail(*_: Any) -> NoReturn:
    raise RuntimeError(PRIVATE)


@pytest.mark.parametrize("method", ["Trace", "GradientLens"])
async def test_an_unexpected_exception_is_internal_and_shows_its_id_only(
    demo: Loaded, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = {"Trace": TRACE, "GradientLens": NLL}[method]
    async with served(demo) as stub:
        before = [timeless(m) async for m in getattr(stub, method)(request)]
        with broken(demo.network.get_submodule("transformer.h.2"), fail):
            with caplog.at_level(logging.ERROR):
                answer = await refused(getattr(stub, method)(request))
            assert hooks_of(demo.network) == 1  # the one that fails
        # The failure leaves nothing behind: the next result is bit-identical to the one before.
        assert [timeless(m) async for m in getattr(stub, method)(request)] == before
    assert answer.code is grpc.StatusCode.INTERNAL
    assert (answer.reason, answer.info.domain) == ("INTERNAL", "januslens")
    expected = f"internal error; give the operator this request id: {answer.request_id}"
    assert answer.text == expected
    assert PRIVATE not in str(answer.status)
    assert PRIVATE in caplog.text
    assert f"internal error in request {answer.request_id}" in caplog.text

"""Concurrent requests get the same results as serial ones."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import Message

from januslens.v1 import common_pb2, gradient_lens_pb2, lens_pb2, models_pb2, trace_pb2
from tests.support.calls import methods, prompt, started, timeless
from tests.support.metrics import wait_until_idle
from tests.support.server import ServerProcess

PROMPT = prompt("The capital of Japan is the city of")
PARIS = common_pb2.Target(text=" Paris")
ONES = common_pb2.Tensor(
    data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[128], data=b"\x00\x00\x80?" * 128
)

MIXED: list[tuple[str, Message]] = [
    ("Trace", trace_pb2.TraceRequest(input=PROMPT, include_logit_contribution=True)),
    ("Trace", trace_pb2.TraceRequest(input=prompt("Lionel Messi"), all_positions=True)),
    ("Trace", trace_pb2.TraceRequest(input=PROMPT, layers=[0, 3], target=PARIS, top_k=50)),
    (
        "GradientLens",
        gradient_lens_pb2.GradientLensRequest(
            input=PROMPT, nll=gradient_lens_pb2.NegativeLogLikelihood(target=PARIS)
        ),
    ),
    (
        "GradientLens",
        gradient_lens_pb2.GradientLensRequest(
            input=prompt("Peru"),
            kl=gradient_lens_pb2.KlDivergence(suppressed=common_pb2.TokenIds(ids=[300])),
            include_factors=True,
            spectrum_rank=3,
        ),
    ),
    ("Project", lens_pb2.ProjectRequest(vectors=ONES, target=PARIS)),
    ("Tokenize", models_pb2.TokenizeRequest(text="The capital of Peru")),
    ("Trace", trace_pb2.TraceRequest(input=prompt("Peru"), include_vectors=True)),
]


def answer(call: Any, method: str) -> list[Message]:
    return list(call) if methods()[method].server_streaming else [call.result()]


def test_64_mixed_requests_equal_their_serial_results(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    alone = [
        [timeless(m) for m in answer(started(channel, method, request), method)]
        for method, request in MIXED
    ]
    requests = MIXED * 8
    assert len(requests) == 64
    calls = [started(channel, method, request) for method, request in requests]
    for i, ((method, _), call) in enumerate(zip(requests, calls, strict=True)):
        together = [timeless(message) for message in answer(call, method)]
        assert together == alone[i % len(MIXED)]
    wait_until_idle(server)

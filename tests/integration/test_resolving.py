"""Requests are resolved once, and responses encoded, outside the event loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from januslens.v1 import (
    activations_pb2,
    common_pb2,
    cost_pb2,
    edits_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    interventions_pb2,
    lens_pb2,
    models_pb2,
    neurons_pb2,
    server_pb2,
    sites_pb2,
    trace_pb2,
)
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.pipelines.resolve import resolve_preview_edit
from januslens_server.results import Token
from januslens_server.rpc import admission, decode, wire
from januslens_server.rpc.call import SERVICE
from januslens_server.specs import PreviewEditSpec, TraceSpec
from tests.support.calls import prompt
from tests.support.in_process import Loaded, loaded, served

PROMPT = "The capital of Japan is the city of"
OTHER = "The capital of Peru is the city of"
TARGET = common_pb2.Target(text=" Paris")
TRACE = trace_pb2.TraceRequest(input=prompt(PROMPT), target=TARGET)

# Requests by RPC, and the texts in each of them.
REQUESTS: dict[str, tuple[Any, list[str]]] = {
    "Trace": (TRACE, [PROMPT, " Paris"]),
    "GradientLens": (
        gradient_lens_pb2.GradientLensRequest(
            input=prompt(PROMPT), nll=gradient_lens_pb2.NegativeLogLikelihood(target=TARGET)
        ),
        [PROMPT, " Paris"],
    ),
    "PreviewEdit": (
        edits_pb2.PreviewEditRequest(
            input=prompt(PROMPT),
            target=TARGET,
            shift=edits_pb2.ForwardShift(layer=1, eta=0.1),
            probes=[edits_pb2.Probe(input=prompt("Japan"))],
        ),
        [PROMPT, " Paris", "Japan"],
    ),
    "Activations": (
        activations_pb2.ActivationsRequest(
            input=prompt(PROMPT), sites=[sites_pb2.SITE_HEAD_RESULT], heads=[1]
        ),
        [PROMPT],
    ),
    "Intervene": (
        intervene_pb2.InterveneRequest(
            input=prompt(PROMPT),
            target=TARGET,
            sweep=intervene_pb2.Sweep(
                template=interventions_pb2.Intervention(
                    site=sites_pb2.SITE_BLOCK_OUTPUT,
                    patch=interventions_pb2.Patch(
                        input=prompt("The capital of Peru is the city of")
                    ),
                ),
                by_layer=True,
            ),
        ),
        [PROMPT, " Paris", OTHER],
    ),
    "FindNeurons": (neurons_pb2.FindNeuronsRequest(token=TARGET, page_size=5), [" Paris"]),
    "EstimateCost": (cost_pb2.EstimateCostRequest(trace=TRACE), [PROMPT, " Paris"]),
}


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return loaded()


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that the tokenizer was given, in order of calls."""
    texts: list[str] = []

    def recorded(encode: Callable[..., list[Token]]) -> Callable[..., list[Token]]:
        def encode_and_record(self: Vocabulary, text: str, **options: Any) -> list[Token]:
            texts.append(text)
            return encode(self, text, **options)

        return encode_and_record

    for name in ("encode_prompt", "encode_continuation"):
        monkeypatch.setattr(Vocabulary, name, recorded(getattr(Vocabulary, name)))
    return texts


@pytest.mark.parametrize("rpc", REQUESTS)
async def test_each_text_of_a_request_is_tokenized_once(
    demo: Loaded, tokenized: list[str], rpc: str
) -> None:
    request, texts = REQUESTS[rpc]
    async with served(demo) as stub:
        call = getattr(stub, rpc)(request)
        if hasattr(call, "__aiter__"):
            assert [message async for message in call]
        else:
            await call
    assert sorted(tokenized) == sorted(texts)


DECODERS = {
    "Trace": "trace_spec",
    "GradientLens": "gradient_lens_spec",
    "PreviewEdit": "preview_edit_spec",
    "Activations": "activations_spec",
    "Intervene": "intervene_spec",
    "FindNeurons": "find_neurons_spec",
    "EstimateCost": "trace_spec",
}


@pytest.mark.parametrize("rpc", DECODERS)
async def test_requests_are_decoded_outside_the_event_loop(
    demo: Loaded, monkeypatch: pytest.MonkeyPatch, rpc: str
) -> None:
    """Decoding 16,384 experiments in it would delay health checks by 0.2 s."""
    decoded, threads = getattr(decode, DECODERS[rpc]), []

    def recorded(*args: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return decoded(*args, **named)

    monkeypatch.setattr(decode, DECODERS[rpc], recorded)
    async with served(demo) as stub:
        call = getattr(stub, rpc)(REQUESTS[rpc][0])
        if hasattr(call, "__aiter__"):
            assert [message async for message in call]
        else:
            await call
    assert len(threads) == 1
    assert threading.current_thread() not in threads


PROBES = edits_pb2.PreviewEditRequest(
    input=prompt(PROMPT),
    target=TARGET,
    shift=edits_pb2.ForwardShift(layer=1, eta=0.1),
    probes=[edits_pb2.Probe(input=prompt(f"Japan {i}")) for i in range(64)],
)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_stopped_request_tokenizes_no_further_text(
    demo: Loaded, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    texts: list[str] = []
    reached, released, ended = threading.Event(), threading.Event(), threading.Event()
    encode = Vocabulary.encode_prompt

    def held(self: Vocabulary, text: str, **options: Any) -> list[Token]:
        texts.append(text)
        if len(texts) == 3:
            reached.set()
            assert released.wait(30)
        return encode(self, text, **options)

    def resolved(*args: Any) -> Any:
        try:
            return resolve_preview_edit(*args)
        finally:
            ended.set()

    monkeypatch.setattr(Vocabulary, "encode_prompt", held)
    monkeypatch.setattr("januslens_server.rpc.service.resolve_preview_edit", resolved)
    async with served(demo) as stub:
        call: Any = stub.PreviewEdit(PROBES, timeout=2 if how == "deadline" else 60)
        assert await asyncio.to_thread(reached.wait, 30)
        if how == "cancel":
            call.cancel()
        # Wait for the server to notice, which the caller does at once.
        while (code := await call.code()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        released.set()
        assert await asyncio.to_thread(ended.wait, 30)
    assert code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert len(texts) == 3


async def test_request_that_takes_long_to_prepare_is_refused(
    demo: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PREPARATION_SECONDS", 0.0)
    async with served(demo) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="preparing it took more than 0 s") as error:
            await stub.PreviewEdit(PROBES)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("rpc", ["Trace", "PreviewEdit"])
async def test_refused_request_is_not_kept_until_a_garbage_collection(
    demo: Loaded, rpc: str
) -> None:
    """gRPC keeps the errors of calls in reference cycles, and with them what their frames hold."""
    long = common_pb2.Input(token_ids=common_pb2.TokenIds(ids=[1000] * 100_000))
    requests = {
        "Trace": trace_pb2.TraceRequest(input=long),
        "PreviewEdit": edits_pb2.PreviewEditRequest(
            input=long, target=TARGET, shift=edits_pb2.ForwardShift(layer=1, eta=0.1)
        ),
    }
    async with served(demo) as stub:
        gc.disable()
        try:
            assert (
                await getattr(stub, rpc)(requests[rpc]).code() is grpc.StatusCode.INVALID_ARGUMENT
            )
            deadline = time.monotonic() + 10
            while kept() and time.monotonic() < deadline:  # noqa: ASYNC110 - the handler ends soon
                await asyncio.sleep(0.05)
            assert not kept()
        finally:
            gc.enable()


def kept() -> list[object]:
    """The specs of long prompts that are still in memory."""
    specs = [o for o in gc.get_objects() if type(o) in (TraceSpec, PreviewEditSpec)]
    return [spec for spec in specs if len(spec.prompt) == 100_000]


async def test_unary_responses_are_serialized_outside_the_event_loop(
    demo: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32,
        shape=[2, demo.registry.get("demo").view.facts.d_model],
    )
    vectors.data = bytes(4 * vectors.shape[0] * vectors.shape[1])
    requests: dict[str, Any] = {
        "ListModels": models_pb2.ListModelsRequest(),
        "GetModel": models_pb2.GetModelRequest(model="demo"),
        "GetServerInfo": server_pb2.GetServerInfoRequest(),
        "Tokenize": models_pb2.TokenizeRequest(text="Japan"),
        "Project": lens_pb2.ProjectRequest(vectors=vectors),
        **{rpc: REQUESTS[rpc][0] for rpc in ("PreviewEdit", "FindNeurons", "EstimateCost")},
    }
    assert requests.keys() == {m.name for m in SERVICE.methods if not m.server_streaming}

    def bytes_only(response: bytes) -> bytes:
        if not isinstance(response, bytes):
            raise TypeError("gRPC serializes responses in the event loop")
        return response

    monkeypatch.setattr(wire, "serialized", bytes_only)
    async with served(demo) as stub:
        for rpc, request in requests.items():
            assert (await getattr(stub, rpc)(request)).ByteSize()

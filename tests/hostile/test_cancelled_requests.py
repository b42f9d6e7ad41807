"""Requests that are cancelled at any moment return their places, and keep no memory."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from januslens.v1 import generation_pb2, intervene_pb2, interventions_pb2, sites_pb2
from januslens_server.access.callers import Caller, Quotas
from januslens_server.access.quotas import QuotaBook
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.pipelines.resolve import ResolvedGenerate, ResolvedIntervene
from januslens_server.rpc.reception import OF_ONE_CALLER
from januslens_server.specs import GenerateSpec, InterveneSpec
from tests.support.calls import prompt, timeless
from tests.support.in_process import Loaded, broken, loaded, served

PROMPT = prompt("The capital of Japan is the city of")
GENERATE = generation_pb2.GenerateRequest(input=PROMPT, max_new_tokens=16)
INTERVENE = intervene_pb2.InterveneRequest(
    input=PROMPT,
    sweep=intervene_pb2.Sweep(
        template=interventions_pb2.Intervention(site=sites_pb2.SITE_HEAD_RESULT, zero=True),
        by_layer=True,
        by_position=True,
        by_head=True,
    ),
)
CALLER = Caller(name="ada", tokens=(), quotas=Quotas(concurrent=1))
Cancel = Callable[[], None]
Moment = Callable[[Loaded, Cancel], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return loaded()


@pytest.fixture
def book() -> QuotaBook:
    return QuotaBook()


@pytest.fixture
async def stub(demo: Loaded, book: QuotaBook) -> AsyncIterator[Any]:
    """A server that runs one request of the caller at a time."""
    async with served(demo, caller=CALLER, quotas=book) as found:
        yield found


def in_pass(number: int) -> Moment:
    """Cancel in the middle of a forward pass: the first one reads the prompt."""

    @contextmanager
    def moment(demo: Loaded, cancel: Cancel) -> Iterator[None]:
        passes = iter(range(10_000))

        def count(*_: object) -> None:
            if next(passes) == number:
                cancel()

        with broken(demo.network.get_submodule("transformer.h.2.mlp"), count):
            yield

    return moment


@contextmanager
def before_admission(_demo: Loaded, cancel: Cancel) -> Iterator[None]:
    """Cancel while the prompt is tokenized."""
    encode = Vocabulary.encode_prompt

    def cancelled(self: Vocabulary, text: str, **options: Any) -> Any:
        cancel()
        return encode(self, text, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Vocabulary, "encode_prompt", cancelled)
        yield


MOMENTS: dict[str, tuple[str, Any, Moment]] = {
    "Generate before admission": ("Generate", GENERATE, before_admission),
    "Generate in the prompt": ("Generate", GENERATE, in_pass(0)),
    "Generate in the second token": ("Generate", GENERATE, in_pass(1)),
    "Intervene before admission": ("Intervene", INTERVENE, before_admission),
    "Intervene in the second batch": ("Intervene", INTERVENE, in_pass(2)),
}


def kept() -> tuple[int, int]:
    """Return how many requests and tensors are in memory."""
    gc.collect()
    requests = (GenerateSpec, InterveneSpec, ResolvedGenerate, ResolvedIntervene)
    found = gc.get_objects()
    return (
        sum(type(each) in requests for each in found),
        sum(type(each) is torch.Tensor for each in found),
    )


@pytest.mark.parametrize(("rpc", "request_", "moment"), MOMENTS.values(), ids=list(MOMENTS))
async def test_cancelled_requests_return_their_places_and_memory(
    demo: Loaded, stub: Any, book: QuotaBook, rpc: str, request_: Any, moment: Moment
) -> None:
    """One caller cancels as many requests as it has places, and then runs one."""
    call_rpc, loop = getattr(stub, rpc), asyncio.get_running_loop()

    async def results() -> list[bytes]:
        return [timeless(message) async for message in call_rpc(request_)]

    async def cancelled() -> None:
        call = call_rpc(request_)
        done = threading.Event()

        def cancel_in_loop() -> None:
            call.cancel()
            done.set()

        def cancel() -> None:
            """Cancel in the event loop; a thread of the server waits for it."""
            loop.call_soon_threadsafe(cancel_in_loop)
            assert done.wait(60)

        with moment(demo, cancel):
            with pytest.raises(asyncio.CancelledError):
                async for _ in call:
                    pass
            while book._open:  # noqa: ASYNC110 - its thread sets no asyncio event
                await asyncio.sleep(0.01)

    expected = await results()
    await cancelled()
    before = kept()
    for _ in range(OF_ONE_CALLER if moment is before_admission else 2):
        await cancelled()
    deadline = loop.time() + 10
    while kept() > before and loop.time() < deadline:  # noqa: ASYNC110 - the last thread ends soon
        await asyncio.sleep(0.05)
    assert kept() <= before
    assert await results() == expected

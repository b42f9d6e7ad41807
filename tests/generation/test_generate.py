"""Sampling, ends, readings, cost, cancellation and turns of generations."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache

from januslens_server.errors import CancelCheck, InvalidRequest, RequestCancelled, never_cancelled
from januslens_server.lens.projection import project
from januslens_server.models.decoding import Sampler
from januslens_server.models.registry import Registry, embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import forward
from januslens_server.pipelines.cost import demand_of
from januslens_server.pipelines.generate import generate
from januslens_server.pipelines.resolve import resolve_generate, resolve_trace
from januslens_server.pipelines.self_check import checked
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    FinishReason,
    GeneratedToken,
    GenerationHeader,
    GenerationSummary,
)
from januslens_server.scheduling.job import QueuedRequest, ResultBuffer
from januslens_server.scheduling.worker import DeviceWorker
from januslens_server.specs import GenerateSpec, LayerReading, LensSpec, Sampling, TraceSpec
from tests.support.in_process import hooks_of

PROMPT = "The capital of Japan is the city of"


@pytest.fixture(scope="module")
def demo() -> ResidentModel:
    registry = Registry([embedded_source()], checked, lambda _: None)
    registry.load_all()
    return registry.get("demo")


def run(model: ResidentModel, spec: GenerateSpec) -> tuple[list[GeneratedToken], GenerationSummary]:
    header, *tokens, summary = generate(resolve_generate(model, spec), never_cancelled)
    assert isinstance(header, GenerationHeader)
    assert isinstance(summary, GenerationSummary)
    return [token for token in tokens if isinstance(token, GeneratedToken)], summary


def ids(tokens: list[GeneratedToken]) -> list[int]:
    return [token.token.id for token in tokens]


# ------------------------------------------------------------------------------------------------
# Sampling.

LOGITS = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.0, -1.0, -torch.inf, -3.0])
# Chi-square exceeds these with probability 1e-4, by degrees of freedom.
CRITICAL = {1: 15.14, 2: 18.42, 3: 21.11, 5: 25.74, 6: 27.86}
DRAWS = 2000


def allowed(sampling: Sampling) -> torch.Tensor:
    """The distribution by the definitions, in another way than the sampler's."""
    weights = (LOGITS.double() / sampling.temperature).exp()
    order = sorted(range(len(LOGITS)), key=lambda i: (-float(LOGITS[i]), i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    kept, total = [], float(sum(weights[i] for i in order))
    reached = 0.0
    for i in order:
        if sampling.top_p and reached >= sampling.top_p:
            break
        kept.append(i)
        reached += float(weights[i]) / total
    chosen = torch.zeros(len(LOGITS), dtype=torch.double)
    chosen[kept] = weights[kept]
    return chosen / chosen.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.5, seed=2),
        Sampling(2.0, top_k=3, seed=3),
        Sampling(1.0, top_p=0.6, seed=4),
        Sampling(1.5, top_k=5, top_p=0.7, seed=2**64 - 1),
    ],
)
def test_frequencies_match_the_distribution(sampling: Sampling) -> None:
    sampler, expected = Sampler(sampling), allowed(sampling)
    counts = torch.bincount(
        torch.tensor([sampler.draw(LOGITS) for _ in range(DRAWS)]), minlength=len(LOGITS)
    )
    possible = expected > 0
    assert int(counts[~possible].sum()) == 0
    due = expected[possible] * DRAWS
    statistic = float(((counts[possible] - due) ** 2 / due).sum())
    assert statistic < CRITICAL[int(possible.sum()) - 1]


def test_seed_repeats_the_draws_and_another_seed_does_not(demo: ResidentModel) -> None:
    def drawn(seed: int) -> list[int]:
        spec = GenerateSpec(PROMPT, 20, Sampling(1.5, seed=seed))
        return ids(run(demo, spec)[0])

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_temperature_0_takes_the_lowest_id_of_equal_logits() -> None:
    assert Sampler(Sampling()).draw(torch.tensor([0.0, 2.0, 2.0, 1.0])) == 1


def test_sampling_restricted_to_one_token_equals_greedy(demo: ResidentModel) -> None:
    greedy = ids(run(demo, GenerateSpec(PROMPT, 8))[0])
    for sampling in (Sampling(1.0, top_k=1, seed=1), Sampling(1.0, top_p=1e-9, seed=1)):
        assert ids(run(demo, GenerateSpec(PROMPT, 8, sampling))[0]) == greedy


# ------------------------------------------------------------------------------------------------
# Ends.


def test_generation_ends_after_the_end_of_sequence_token(demo: ResidentModel) -> None:
    spec = GenerateSpec(PROMPT, 60)
    tokens, summary = run(demo, spec)
    assert summary.finish_reason is FinishReason.END_OF_SEQUENCE
    assert tokens[-1].token.text == "<|endoftext|>"
    assert [token.token.text for token in tokens].count("<|endoftext|>") == 1
    assert summary.generated == len(tokens)


def test_generation_ends_at_the_first_of_several_end_ids(demo: ResidentModel) -> None:
    spec = GenerateSpec(PROMPT, 8)
    endless = ids(run(replace(demo, end_ids=frozenset()), spec)[0])
    ends = frozenset({endless[3], endless[6], 10**6})
    tokens, summary = run(replace(demo, end_ids=ends), spec)
    last = next(i for i, token_id in enumerate(endless) if token_id in ends)
    assert ids(tokens) == endless[: last + 1]
    assert summary.finish_reason is FinishReason.END_OF_SEQUENCE


def test_stop_text_may_span_tokens(demo: ResidentModel) -> None:
    tokens, _ = run(demo, GenerateSpec(PROMPT, 8))
    said = [token.token.text for token in tokens]
    across = said[0][-2:] + said[1]
    found, summary = run(demo, GenerateSpec(PROMPT, 8, stop=("not there", across)))
    assert ids(found) == ids(tokens)[:2]
    assert summary.finish_reason is FinishReason.STOP_TEXT


def test_stop_text_in_the_prompt_does_not_end_the_generation(demo: ResidentModel) -> None:
    _, summary = run(demo, GenerateSpec(PROMPT, 2, stop=("Japan",)))
    assert summary.finish_reason is FinishReason.MAX_NEW_TOKENS


def test_generation_ends_when_the_context_is_full(demo: ResidentModel) -> None:
    context = demo.view.facts.max_positions
    prompt = tuple([5] * (context - 2))
    tokens, summary = run(demo, GenerateSpec(prompt, 50, Sampling(5.0, seed=1)))
    assert len(tokens) == 3
    assert summary.finish_reason is FinishReason.MAX_POSITIONS
    with pytest.raises(InvalidRequest, match="too many tokens"):
        resolve_generate(demo, GenerateSpec(tuple([5] * (context + 1)), 1))


# ------------------------------------------------------------------------------------------------
# Figures.


def test_layers_are_read_as_by_the_lens_at_the_last_position(demo: ResidentModel) -> None:
    layers, last_layer = (0, 2, 3), 3
    spec = GenerateSpec(PROMPT, 4, top_k=4, reading=LayerReading(layers, top_k=3))
    request = resolve_generate(demo, spec)
    tokens, _ = run(demo, spec)
    prompt = [token.id for token in request.tokens]
    for step, made in enumerate(tokens):
        before = prompt + ids(tokens)[:step]
        last = (len(before) - 1,)
        passed = forward(demo, before, (), never_cancelled, last, last)
        with torch.no_grad():
            states = demo.network(
                input_ids=torch.tensor([before]), output_hidden_states=True, use_cache=False
            ).hidden_states
        target = torch.tensor([[made.token.id]])
        assert [read.layer for read in made.layers] == list(layers)
        for read in made.layers:
            # The last of transformers' hidden states is after the final norm.
            output = passed.residual if read.layer == last_layer else states[read.layer + 1][0]
            output = output[-1:]
            table = project(demo.view.lens, output, LensSpec(3, 0), target)
            assert read.rank == int(table.target_ranks[0, 0])
            assert read.probability == pytest.approx(
                float(table.target_probabilities[0, 0]), abs=1e-5
            )
            assert list(read.top_ids) == table.top_ids[0].tolist()
        distribution = passed.logits[0].double().softmax(-1)
        best = distribution.topk(4)
        assert list(made.top_ids) == best.indices.tolist()
        assert list(made.top_probabilities) == pytest.approx(best.values.tolist(), abs=1e-5)


def test_without_reading_no_layer_is_reported(demo: ResidentModel) -> None:
    tokens, _ = run(demo, GenerateSpec(PROMPT, 2, top_k=0))
    assert all(not token.layers and not token.top_ids for token in tokens)


def test_unknown_layer_is_refused_by_field(demo: ResidentModel) -> None:
    spec = GenerateSpec(PROMPT, reading=LayerReading((0, 99)))
    with pytest.raises(InvalidRequest, match=r"reading\.layers: "):
        resolve_generate(demo, spec)


# ------------------------------------------------------------------------------------------------
# Device.


def test_cost_grows_with_tokens_and_readings(demo: ResidentModel) -> None:
    def demand(spec: GenerateSpec) -> Any:
        return demand_of(resolve_generate(demo, spec))

    few, many = demand(GenerateSpec(PROMPT, 4)), demand(GenerateSpec(PROMPT, 40))
    read = demand(GenerateSpec(PROMPT, 40, reading=LayerReading()))
    assert few.generated == few.passes == 4
    assert many.held > few.held
    assert many.flops > few.flops
    assert read.flops > many.flops
    assert read.vectors == 40 * demo.view.facts.n_layers


def test_cost_without_a_cache_is_that_of_one_pass_over_the_sequence_per_token(
    demo: ResidentModel,
) -> None:
    uncached = replace(demo, view=replace(demo.view, cache_argument=None))

    def demand(length: int, new: int) -> Any:
        spec = GenerateSpec(tuple([1] * length), new, top_k=0)
        return demand_of(resolve_generate(uncached, spec))

    alone = sum(demand(length, 1).flops for length in range(8, 20))
    assert demand(8, 12).flops == pytest.approx(alone, rel=1e-2)
    assert demand(8, 12).held == 0


def test_generations_in_turns_equal_those_alone(demo: ResidentModel) -> None:
    specs = [GenerateSpec(PROMPT, 10, Sampling(1.0, seed=seed)) for seed in range(3)]
    alone = [ids(run(demo, spec)[0]) for spec in specs]
    running = [generate(resolve_generate(demo, spec), never_cancelled) for spec in specs]
    taken: list[list[int]] = [[] for _ in specs]
    active: list[tuple[int, Iterator[Any]]] = list(enumerate(running))
    while active:
        for entry in list(active):
            event = next(entry[1], None)
            if event is None:
                active.remove(entry)
            elif isinstance(event, GeneratedToken):
                taken[entry[0]].append(event.token.id)
    assert taken == alone


async def test_trace_does_not_wait_for_32_generating_callers(demo: ResidentModel) -> None:
    """All generations have begun before the trace is submitted, and none has ended after it."""
    worker = DeviceWorker(max_waiting=64)
    endless = replace(demo, end_ids=frozenset())
    begun: set[int] = set()
    ended: list[str] = []
    all_begun, waiting = threading.Event(), threading.Event()

    def generating(number: int) -> Callable[[CancelCheck], Iterator[Any]]:
        def steps(check: CancelCheck) -> Iterator[Any]:
            spec = GenerateSpec(PROMPT, 100, Sampling(1.0, seed=number))
            # Many times, so that the first do not end while the last begin on a busy machine.
            again = (generate(resolve_generate(endless, spec), check) for _ in range(20))
            for event in chain.from_iterable(again):
                begun.add(number)
                if len(begun) == len(requests) and not all_begun.is_set():
                    all_begun.set()
                    assert waiting.wait(60)  # holds the device until the trace is in the queue
                yield event
            ended.append(f"generation {number}")

        return steps

    def tracing(check: CancelCheck) -> Iterator[Any]:
        yield from trace(resolve_trace(demo, TraceSpec(PROMPT)), check)
        ended.append("trace")

    def submitted(
        steps: Callable[[CancelCheck], Iterator[Any]], request: QueuedRequest
    ) -> asyncio.Task[list[Any]]:
        buffer: ResultBuffer[Any] = ResultBuffer(2**20, lambda _: 1)
        worker.submit(steps, buffer, request)
        return asyncio.create_task(all_of(buffer))

    requests = [QueuedRequest(None, caller=f"caller {i}") for i in range(32)]
    generations = [submitted(generating(i), request) for i, request in enumerate(requests)]
    assert await asyncio.to_thread(all_begun.wait, 60)
    traced = submitted(tracing, QueuedRequest(None, caller="another caller"))
    waiting.set()
    await traced
    first = ended[0]
    for request in requests:
        worker.withdraw(request)
    await asyncio.gather(*generations, return_exceptions=True)
    while worker.unfinished:  # noqa: ASYNC110 - the worker's thread sets no event
        await asyncio.sleep(0.01)
    assert first == "trace"


async def all_of(buffer: ResultBuffer[Any]) -> list[Any]:
    return [item async for item in buffer.items()]


def caches_held() -> tuple[int, int]:
    """Return the number of key-value caches in this process, and the bytes of their tensors."""
    caches = [found for found in gc.get_objects() if issubclass(type(found), Cache)]
    layers: list[Any] = [layer for cache in caches for layer in cache.layers]
    return len(caches), sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@pytest.mark.parametrize("inside_pass", [False, True])
async def test_cancelled_generations_free_their_caches(
    demo: ResidentModel, inside_pass: bool
) -> None:
    """Cancelled between two tokens, or in the middle of a pass; nothing is left to collect."""
    worker = DeviceWorker(max_waiting=8)
    block, facts = demo.view.blocks[2].module, demo.view.facts
    asked = resolve_generate(replace(demo, end_ids=frozenset()), GenerateSpec(PROMPT, 50))
    fed = len(asked.tokens) + 2  # positions in the cache after three tokens
    before = caches_held()
    for _ in range(2):
        held: list[tuple[int, int]] = []
        request = QueuedRequest(None)

        def steps(
            check: CancelCheck,
            request: QueuedRequest = request,
            held: list[tuple[int, int]] = held,
        ) -> Iterator[Any]:
            running = generate(asked, check)
            yield from islice(running, 4)  # the header and three tokens
            held.append(caches_held())
            if inside_pass:
                with hooked(block, request.cancel):
                    yield from running
            request.cancel()
            yield None

        buffer: ResultBuffer[Any] = ResultBuffer(2**20, lambda _: 1)
        worker.submit(steps, buffer, request)
        with pytest.raises(RequestCancelled):
            await all_of(buffer)
        assert held[0][0] == before[0] + 1
        assert held[0][1] - before[1] == facts.n_layers * fed * 2 * facts.d_model * 4
        assert caches_held() == before


@contextmanager
def hooked(module: nn.Module, call: Callable[[], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _module, _args: call())
    try:
        yield
    finally:
        handle.remove()


def test_cancellation_ends_a_step(demo: ResidentModel) -> None:
    calls, hooks = 0, hooks_of(demo.network)

    def cancelled() -> None:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise RequestCancelled("test")

    running = generate(resolve_generate(demo, GenerateSpec(PROMPT, 50)), cancelled)
    with pytest.raises(RequestCancelled):
        list(running)
    assert hooks_of(demo.network) == hooks

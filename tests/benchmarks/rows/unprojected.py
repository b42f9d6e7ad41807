"""Trace without projections, or only the residual stream, beside plain transformers with hooks.

All of this runs in one process, so it is measured in processor time, which depends less on other
programs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.resolve import resolve_activations, resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import LayerGraph, NodeKind, TraceEvent
from januslens_server.rpc.encode import ActivationsEncoder, TraceEncoder
from januslens_server.rpc.wire import serialized
from januslens_server.specs import ActivationsSpec, LensSpec, Selection, Site, TraceSpec
from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved

NEURONS = frozenset({NodeKind.MLP_VALUE, NodeKind.MLP_OUTPUT})
HEADS = frozenset({NodeKind.HEAD_OUTPUT, NodeKind.ATTENTION_CONCAT})
PATTERNS = frozenset({NodeKind.HEAD_OUTPUT, NodeKind.MEMORY_VALUE})
EVERYTHING = Selection(heads=0, memory_values_per_head=0, top_neurons=0)


def measure(bench: Bench) -> Iterator[Row]:
    """Compare the processor time until all messages are encoded, without a server."""
    model, ids = bench.model, bench.shape.tokens(bench.shape.prompt)
    long = bench.shape.tokens(bench.shape.long_prompt // 2)
    stream = TraceSpec(long, node_kinds=frozenset({NodeKind.BLOCK_OUTPUT}), all_positions=True)
    projected = bench.floors.rows(len(model.view.blocks) * len(long))
    events = list(trace(resolve_trace(model, TraceSpec(ids)), _go_on))
    taken = interleaved(
        {
            "plain contributions": lambda: _plain_contributions(model, ids),
            "neurons": lambda: _messages(model, _unprojected(ids, NEURONS)),
            "heads": lambda: _messages(model, _unprojected(ids, HEADS)),
            "forward": lambda: bench.floors.forward(long),
            "product": lambda: bench.floors.product(projected),
            "plain stream": lambda: _plain_stream(model, long),
            "stream": lambda: _messages(model, stream),
            "plain patterns": lambda: _plain_patterns(model, ids),
            "patterns": lambda: _patterns(model, ids),
            "patterns as nodes": lambda: _messages(
                model, _unprojected(ids, PATTERNS, everywhere=True)
            ),
            "encoding": lambda: _encoded(model, events),
        },
        bench.rounds,
        time.process_time,
    )
    plain = f"hooks for neurons and heads, {taken['plain contributions']:.3f} s"
    for name in ("neurons", "heads"):
        ratio = taken[name] / taken["plain contributions"]
        yield Row(f"Contributions of all {name}, without tokens", ratio, "x", 2.0, plain, taken)
    floor = taken["forward"] + taken["product"]
    name = f"Residual stream at {len(long)} positions, with its lens"
    beside = f"HF forward + GEMM of {len(projected)} rows, {floor:.3f} s"
    yield Row(name, taken["stream"] / floor, "x", 1.3, beside, taken)
    beside = f"HF with the same lists, entropies and ranks, {taken['plain stream']:.3f} s"
    yield Row("The same", taken["stream"] / taken["plain stream"], "x", 1.0, beside, taken)
    beside = f"HF with output_attentions, {taken['plain patterns']:.3f} s"
    for name, goal in (("patterns", 2.0), ("patterns as nodes", None)):
        ratio = taken[name] / taken["plain patterns"]
        yield Row(f"Attention {name}, {len(ids)} positions", ratio, "x", goal, beside, taken)
    nodes = sum(len(event.nodes) for event in events if isinstance(event, LayerGraph))
    each = 1e6 * taken["encoding"] / nodes
    yield Row("Default trace, from results to bytes, each node", each, "µs", 15.0, f"{nodes} nodes")


def _unprojected(
    ids: Sequence[int], kinds: frozenset[NodeKind], *, everywhere: bool = False
) -> TraceSpec:
    return TraceSpec(
        tuple(ids),
        selection=EVERYTHING,
        node_kinds=kinds,
        all_positions=everywhere,
        lens=LensSpec(0, 0),
        include_projections=False,
    )


def _messages(model: ResidentModel, spec: TraceSpec) -> list[bytes]:
    return _encoded(model, trace(resolve_trace(model, spec), _go_on))


def _patterns(model: ResidentModel, ids: Sequence[int]) -> list[bytes]:
    encoder = ActivationsEncoder("benchmark")
    spec = ActivationsSpec(tuple(ids), (Site.ATTENTION_PATTERN,))
    return [
        serialized(message)
        for event in activations(resolve_activations(model, spec), _go_on)
        for message in encoder.encode(event)
    ]


def _encoded(model: ResidentModel, events: Iterable[TraceEvent | None]) -> list[bytes]:
    encoder = TraceEncoder("benchmark", model.vocabulary.token)
    return [
        serialized(message)
        for event in events
        if event is not None
        for message in encoder.encode(event)
    ]


@torch.inference_mode()
def _plain_contributions(model: ResidentModel, ids: Sequence[int]) -> list[torch.Tensor]:
    """Return contributions of all neurons and heads of GPT-2 to the predicted token's logit."""
    network: Any = model.network
    found: list[torch.Tensor] = []

    def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(inputs[0][0, -1])

    blocks, norm = network.transformer.h, network.transformer.ln_f
    maps = [layer for block in blocks for layer in (block.attn.c_proj, block.mlp.c_proj)]
    hooks: list[Any] = [layer.register_forward_pre_hook(hook) for layer in maps]
    hooks.append(norm.register_forward_pre_hook(hook))
    try:
        logits = network(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    finally:
        for handle in hooks:
            handle.remove()
    *activations, residual = found
    scale = (residual.var(unbiased=False) + norm.eps).rsqrt()
    direction = network.lm_head.weight[logits.argmax()] * norm.weight * scale
    direction = direction - direction.mean()
    parts = [x * (layer.weight @ direction) for x, layer in zip(activations, maps, strict=True)]
    heads = network.config.n_head
    return [part.view(heads, -1).sum(1) if i % 2 == 0 else part for i, part in enumerate(parts)]


@torch.inference_mode()
def _plain_stream(model: ResidentModel, ids: Sequence[int]) -> list[Any]:
    """Return what GPT-2's residual stream predicts after each block, at all positions."""
    network: Any = model.network
    lens, batch = LensSpec(), torch.tensor([list(ids)])
    passed = network(input_ids=batch, use_cache=False, output_hidden_states=True)
    targets = passed.logits[0].argmax(-1, keepdim=True)
    found: list[Any] = []
    for layer, hidden in enumerate(passed.hidden_states[1:], start=1):
        last = layer == len(passed.hidden_states) - 1
        logits = passed.logits[0] if last else network.lm_head(network.transformer.ln_f(hidden[0]))
        logs = logits.log_softmax(-1)
        entropies = -(logs.exp() * logs).sum(-1)
        ranks = (logits > logits.gather(1, targets)).sum(-1)
        ends = (logits.topk(lens.top_k), logits.topk(lens.bottom_k, largest=False))
        found += [entropies.tolist(), ranks.tolist()]
        found += [values.tolist() for end in ends for values in end]
    return found


@torch.inference_mode()
def _plain_patterns(model: ResidentModel, ids: Sequence[int]) -> list[Any]:
    """Return the attention patterns of all layers as lists of numbers."""
    network: Any = model.network
    before = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        batch = torch.tensor([list(ids)])
        patterns = network(input_ids=batch, use_cache=False, output_attentions=True).attentions
        return [pattern[0].tolist() for pattern in patterns]
    finally:
        network.set_attn_implementation(before)


def _go_on() -> None:
    """A cancellation check that never cancels."""

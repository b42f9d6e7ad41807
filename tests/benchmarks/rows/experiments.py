"""Experiments and activations, compared with plain Hugging Face passes with a hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from januslens import Site
from januslens.interventions import SweepOver, noise, patch, zero
from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved

BYTES_PER_SECOND = 300e6
# ROME's causal trace corrupts the subject, here the first quarter of the prompt.
CORRUPTION, SEED = 0.1, 7


def measure(bench: Bench) -> Iterator[Row]:
    """Head knock-outs, a causal trace, and activations, as the client sees them."""
    ids, client = bench.shape.tokens(bench.shape.prompt), bench.client
    subject = range(len(ids) // 4)
    plain = PlainExperiments(bench.model.network, ids)
    heads = SweepOver(zero("HEAD_RESULT"), by=["layer", "head"])
    restore = SweepOver(patch("BLOCK_OUTPUT", source=ids), by=["layer", "position"])
    corrupt = noise(CORRUPTION, seed=SEED, positions=subject)
    sites = [Site.BLOCK_OUTPUT, Site.NEURONS]
    long = bench.shape.tokens(bench.shape.long_prompt)
    size = sum(tensor.numpy().nbytes for tensor in client.activations(long, sites=sites).tensors)
    taken = interleaved(
        {
            "plain knock-outs": plain.knock_outs,
            "knock-outs": lambda: client.intervene(ids, sweep=heads),
            "plain trace": lambda: plain.causal_trace(subject),
            "trace": lambda: client.intervene(ids, sweep=restore, always=[corrupt]),
            "forward": lambda: bench.floors.forward(long),
            "activations": lambda: client.activations(long, sites=sites),
        },
        bench.rounds,
    )
    layers, count = bench.shape.layers, bench.shape.heads
    yield Row(
        f"Intervene: all {layers * count} heads zeroed one by one, {len(ids)} tokens",
        taken["knock-outs"] / taken["plain knock-outs"],
        "x",
        0.4,
        f"as many HF forwards with a hook, {taken['plain knock-outs']:.2f} s",
        taken,
    )
    yield Row(
        f"Intervene: causal trace, {layers} layers x {len(ids)} positions",
        taken["trace"] / taken["plain trace"],
        "x",
        0.5,
        f"as many HF forwards with hooks, {taken['plain trace']:.2f} s",
        taken,
    )
    floor = taken["forward"] + size / BYTES_PER_SECOND
    yield Row(
        f"Activations: block outputs and neurons, {len(long)} tokens, {size / 1e6:.1f} MB",
        taken["activations"] / floor,
        "x",
        1.3,
        f"HF forward {taken['forward']:.3f} s + the bytes at 300 MB/s",
        taken,
    )


class PlainExperiments:
    """The same experiments as loops of forward passes with hooks, one experiment a pass."""

    def __init__(self, network: Any, ids: Sequence[int]) -> None:
        """`network` has GPT-2's modules."""
        self._network = network
        self._blocks = network.transformer.h
        self._batch = torch.tensor([list(ids)])

    def knock_outs(self) -> None:
        """Zero each head of each layer."""
        for block in self._blocks:
            width = block.attn.head_dim
            for head in range(block.attn.num_heads):
                columns = slice(head * width, (head + 1) * width)
                self._run((block.attn.c_proj, _before(_zeroed(columns))))

    def causal_trace(self, subject: range) -> None:
        """Corrupt the embedding, and restore the output of each block at each position."""
        clean: list[torch.Tensor] = []
        handles = [
            block.register_forward_hook(lambda _m, _a, out: clean.append(_tensor(out)))
            for block in self._blocks
        ]
        self._run()
        for handle in handles:
            handle.remove()
        generator = torch.Generator().manual_seed(SEED)
        shape = self._batch.shape[1], clean[0].shape[-1]
        added = CORRUPTION * torch.randn(shape, generator=generator)

        def corrupted(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[0, subject.start : subject.stop] += added[subject.start : subject.stop]
            return x

        for layer, block in enumerate(self._blocks):
            for position in range(self._batch.shape[1]):
                restore = _after(_restored(clean[layer], position))
                self._run((self._blocks[0], _before(corrupted)), (block, restore))

    @torch.inference_mode()
    def _run(self, *hooks: tuple[Any, Callable[[Any], Any]]) -> None:
        handles = [register(module) for module, register in hooks]
        try:
            self._network(input_ids=self._batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


Change = Callable[[torch.Tensor], torch.Tensor]


def _zeroed(columns: slice) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., columns] = 0
        return x

    return change


def _restored(clean: torch.Tensor, position: int) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, position] = clean[0, position]
        return x

    return change


def _before(change: Change) -> Callable[[Any], Any]:
    """Return a function that registers a hook on a module's first input."""
    return lambda module: module.register_forward_pre_hook(
        lambda _module, args: (change(args[0]), *args[1:])
    )


def _after(change: Change) -> Callable[[Any], Any]:
    """Return a function that registers a hook on a module's first output."""

    def after(_module: Any, _args: Any, out: Any) -> Any:
        changed = change(_tensor(out))
        return changed if isinstance(out, torch.Tensor) else (changed, *out[1:])

    return lambda module: module.register_forward_hook(after)


def _tensor(out: Any) -> torch.Tensor:
    tensor: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return tensor

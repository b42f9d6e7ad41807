"""Time a researcher's day on published checkpoints: `python -m tests.benchmarks.researchers_day`.

Each task is done by the service, as its client sees it, and by plain transformers with hooks in
this process; both must give the same result. With `--transformer-lens FOLDER`, the site-packages of
an environment that has TransformerLens, it is done by that library as well. The ways alternate, and
the figures are medians of processor time, of client and server together. Tasks of many passes are
done once. `make real` prepares the checkpoints.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import januslens
from januslens.interventions import SweepOver, zero
from tests.benchmarks.bench import machine
from tests.real.checkpoints import GEMMA, SMOLLM

FACT = "The Eiffel Tower is located in the city of"
INDIRECT_OBJECT = "When Mary and John went to the store, John gave a drink to"
COUNTRIES = "France Japan Italy Spain Egypt Peru Cuba Norway Greece Kenya".split()
FRAMES = [
    "The capital of {} is the city of",
    "People who live in {} speak",
    "The currency of {} is the",
    "The largest city in {} is",
    "The most famous food of {} is",
]
FIFTY = [frame.format(country) for frame in FRAMES for country in COUNTRIES]
LISTED = 5
NEURONS = 10  # of each layer, those with the largest contributions
RATES = (0.01, 0.03, 0.1)
EDITED_LAYERS = 7
REPEATED = 24  # tokens that occur twice

Array = NDArray[Any]
Ids = Sequence[int]


class Service:
    """The tasks as requests to a server on this machine."""

    def __init__(self, client: januslens.Client) -> None:
        self._client = client
        (model,) = client.list_models()
        self.layers = model.n_layers

    def ids(self, text: str) -> list[int]:
        return [token.id for token in self._client.tokenize(text, special_tokens=True)]

    def token(self, text: str) -> int:
        return self._client.tokenize(text)[0].id

    def lens(self, ids: Ids) -> Array:
        """Return the top tokens after each layer at the last position `[layers, LISTED]`."""
        trace = self._client.trace(
            ids,
            node_kinds=["BLOCK_OUTPUT"],
            top_k=LISTED,
            bottom_k=0,
            logit_contribution=False,
        )
        found = [node.projection for node in trace.nodes_of("BLOCK_OUTPUT")]
        return np.array([[t.id for t in read.top_tokens] for read in found if read])

    def lenses(self, prompts: Sequence[Ids]) -> Array:
        return np.stack([self.lens(ids) for ids in prompts])

    def contributions(self, ids: Ids) -> Array:
        """Return what heads, and each layer's best neurons, add to the logit of the prediction."""
        trace = self._client.trace(
            ids,
            heads=0,
            top_neurons=NEURONS,
            bottom_neurons=0,
            select_by="contribution",
            node_kinds=[
                "HEAD_OUTPUT",
                "ATTENTION_CONCAT",
                "MLP_VALUE",
                "MLP_SUM",
                "MLP_OUTPUT",
            ],
            top_k=0,
            bottom_k=0,
        )
        heads = sorted(trace.heads(), key=lambda part: (part.node.layer, part.node.head))
        added = np.array([part.logit_contribution for part in heads]).reshape(self.layers, -1)
        neurons = [
            sorted((part.logit_contribution or 0.0 for part in layer.neurons()), reverse=True)
            for layer in trace.layers
        ]
        return np.concatenate([added, np.array(neurons)], 1)

    def knock_outs(self, ids: Ids, target: int, other: int) -> Array:
        """Return the logit differences without each head `[layers, heads]`."""
        heads = SweepOver(zero("HEAD_RESULT", positions=[-1]), by=["layer", "head"])
        found = self._client.intervene(ids, target=target, other=other, sweep=heads)
        differences = [effect.after[0].logit_difference for effect in found.effects]
        return np.array(differences).reshape(self.layers, -1)

    def induction(self, ids: Ids) -> Array:
        """Return the heads' mean attention to the token after the copy `[layers, heads]`."""
        found = self._client.activations(ids, sites="ATTENTION_PATTERN")
        return _induction(found.stack("ATTENTION_PATTERN").transpose(0, 2, 1, 3))

    def gradient(self, ids: Ids, target: int) -> Array:
        """Return the top tokens of FF2's VJPs at all positions `[layers, positions, LISTED]`.

        A VJP that is zero has no top tokens, because all of its logits are equal; its row is -1.
        """
        gradient = self._client.gradient_lens(
            ids, target, matrices=["FF2"], components=0, top_k=LISTED, bottom_k=LISTED
        )
        rows = np.full((self.layers, len(ids), LISTED), -1)
        for matrix in gradient.matrices:
            for part in matrix.components:
                if part.projection:
                    tokens = part.projection.top_tokens
                    rows[matrix.layer, part.position] = [token.id for token in tokens]
        return rows

    def edits(self, ids: Ids, target: int, layers: Sequence[int]) -> Array:
        """Return the target's log-probability after each edit of FF2 `[layers, rates]`."""
        grid = self._client.preview_edits(
            ids, target, learning_rates=RATES, layers=layers, matrices=["FF2"]
        )
        after = [cell.edited.log_probability_after for cell in grid.cells]
        return np.array(after).reshape(len(layers), -1)


class Plain:
    """The tasks with plain transformers and hooks, for the module names of Llama and Gemma."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._blocks = self._model.model.layers
        self._norm = self._model.model.norm
        self._head = self._model.lm_head.weight
        self._heads = self._model.config.num_attention_heads
        self._one = 1.0 if "gemma" in self._model.config.model_type else 0.0

    @torch.inference_mode()
    def lens(self, ids: Ids) -> Array:
        residuals = torch.stack(self._captured(ids, self._blocks, output=True))
        logits = self._norm(residuals) @ self._head.T
        return cast(Array, logits.topk(LISTED).indices.numpy())

    def lenses(self, prompts: Sequence[Ids]) -> Array:
        return np.stack([self.lens(ids) for ids in prompts])

    @torch.inference_mode()
    def contributions(self, ids: Ids) -> Array:
        maps = [m for b in self._blocks for m in (b.self_attn.o_proj, b.mlp.down_proj)]
        *inner, residual = self._captured(ids, [*maps, self._norm])
        target = (self._norm(residual) @ self._head.T).argmax()
        direction = self._through(self._norm, residual, self._head[target])
        rows = []
        for i, block in enumerate(self._blocks):
            attention, neurons = inner[2 * i], inner[2 * i + 1]
            heads = self._products(
                block, "post_attention_layernorm", maps[2 * i], attention, direction
            )
            values = self._products(
                block, "post_feedforward_layernorm", maps[2 * i + 1], neurons, direction
            )
            by_head = heads.view(self._heads, -1).sum(1)
            rows.append(torch.cat([by_head, values.topk(NEURONS).values]))
        return torch.stack(rows).numpy()

    def knock_outs(self, ids: Ids, target: int, other: int) -> Array:
        batch, found = torch.tensor([list(ids)]), []
        width = self._blocks[0].self_attn.o_proj.in_features // self._heads
        for block in self._blocks:
            for head in range(self._heads):
                columns = slice(head * width, (head + 1) * width)
                with _zeroed(block.self_attn.o_proj, columns), torch.inference_mode():
                    last = self._model(batch, use_cache=False, logits_to_keep=1).logits[0, -1]
                found.append(float(last[target] - last[other]))
        return np.array(found).reshape(len(self._blocks), -1)

    @torch.inference_mode()
    def induction(self, ids: Ids) -> Array:
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation("eager")
        try:
            out = self._model(torch.tensor([list(ids)]), use_cache=False, output_attentions=True)
        finally:
            self._model.set_attn_implementation(before)
        return _induction(torch.cat(out.attentions).numpy())

    def gradient(self, ids: Ids, target: int) -> Array:
        vjps = torch.stack([vjp for _, vjp in self._factors(ids, target)])
        with torch.inference_mode():
            logits = self._norm(vjps) @ self._head.T
            tokens = logits.topk(LISTED).indices
            return cast(Array, tokens.where((vjps != 0).any(-1, keepdim=True), -1).numpy())

    def edits(self, ids: Ids, target: int, layers: Sequence[int]) -> Array:
        factors, found = self._factors(ids, target), []
        batch = torch.tensor([list(ids)])
        for layer in layers:
            weight = self._blocks[layer].mlp.down_proj.weight
            inputs, vjps = factors[layer]
            step, before = vjps.T @ inputs, weight.detach().clone()
            for rate in RATES:
                with torch.inference_mode():
                    weight.sub_(rate * step)
                    last = self._model(batch, use_cache=False, logits_to_keep=1).logits[0, -1]
                    found.append(float(last.log_softmax(-1)[target]))
                    weight.copy_(before)
        return np.array(found).reshape(len(layers), -1)

    def _factors(self, ids: Ids, target: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the inputs `[pos, d_mlp]` of FF2 and the VJPs `[pos, d_model]`, by layer."""
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def hook(_module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs.append(given[0][0].detach())
            output.retain_grad()
            outputs.append(output)

        handles = [b.mlp.down_proj.register_forward_hook(hook) for b in self._blocks]
        try:
            batch = torch.tensor([list(ids)])
            logits = self._model(batch, use_cache=False, logits_to_keep=1).logits[0, -1]
            (-logits.log_softmax(-1)[target]).backward()
        finally:
            for handle in handles:
                handle.remove()
        self._model.zero_grad(set_to_none=True)
        grads = [cast(torch.Tensor, output.grad)[0] for output in outputs]
        return list(zip(inputs, grads, strict=True))

    def _captured(
        self, ids: Ids, modules: Sequence[Any], *, output: bool = False
    ) -> list[torch.Tensor]:
        """Return the inputs, or the outputs, of modules at the last position."""
        found: list[torch.Tensor] = []

        def hook(_module: Any, given: tuple[torch.Tensor, ...], made: Any) -> None:
            whole = (made[0] if isinstance(made, tuple) else made) if output else given[0]
            found.append(whole[0, -1])

        handles = [module.register_forward_hook(hook) for module in modules]
        try:
            self._model(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _products(
        self, block: Any, norm: str, linear: Any, inputs: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        """Return what each input of a linear map adds to the logit, through a norm after it."""
        if self._one:  # Gemma's sublayers have a norm after them
            direction = self._through(getattr(block, norm), linear(inputs), direction)
        return cast(torch.Tensor, inputs * (direction @ linear.weight))

    def _through(self, norm: Any, vector: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """Pull a direction back through an RMS norm, whose scale is held fixed."""
        scale = (vector.square().mean() + self._model.config.rms_norm_eps).rsqrt()
        return cast(torch.Tensor, direction * (self._one + norm.weight) * scale)


class TransformerLens:
    """The tasks that need no code of one's own, with a bridge of TransformerLens."""

    def __init__(self, folder: Path) -> None:
        bridge: Any = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
        self._model: Any = bridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
        self._layers = range(self._model.cfg.n_layers)

    @torch.inference_mode()
    def lens(self, ids: Ids) -> Array:
        cache = self._cache(ids, "hook_resid_post", "hook_out")
        last = torch.stack([cache[f"blocks.{i}.hook_out"][0, -1] for i in self._layers])
        logits = self._model.unembed(self._model.ln_final(last[None]))[0]
        return cast(Array, logits.topk(LISTED).indices.numpy())

    def lenses(self, prompts: Sequence[Ids]) -> Array:
        return np.stack([self.lens(ids) for ids in prompts])

    @torch.inference_mode()
    def knock_outs(self, ids: Ids, target: int, other: int) -> Array:
        batch, found = torch.tensor([list(ids)]), []
        heads = self._model.cfg.n_heads
        for layer in self._layers:
            for head in range(heads):

                def zero(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:  # noqa: ARG001
                    changed = z.clone()
                    changed.view(*z.shape[:2], heads, -1)[0, -1, head] = 0
                    return changed

                logits = self._model.run_with_hooks(
                    batch, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)]
                )[0, -1]
                found.append(float(logits[target] - logits[other]))
        return np.array(found).reshape(len(self._layers), -1)

    @torch.inference_mode()
    def induction(self, ids: Ids) -> Array:
        cache = self._cache(ids, "hook_pattern")
        patterns = [cache[f"blocks.{i}.attn.hook_pattern"][0] for i in self._layers]
        return _induction(torch.stack(patterns).numpy())

    def _cache(self, ids: Ids, *names: str) -> Any:
        return self._model.run_with_cache(
            torch.tensor([list(ids)]), names_filter=lambda name: name.endswith(names)
        )[1]


def _induction(patterns: Array) -> Array:
    """Return mean attention to the token after the earlier copy, of `[layers, heads, pos, pos]`."""
    at = np.arange(patterns.shape[-1] - REPEATED, patterns.shape[-1])
    return cast(Array, patterns[:, :, at, at - REPEATED + 1].mean(-1))


@contextmanager
def _zeroed(linear: Any, columns: slice) -> Iterator[None]:
    """Zero inputs of a linear map at the last position."""

    def hook(_module: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        changed = given[0].clone()
        changed[0, -1, columns] = 0
        return (changed,)

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Task(NamedTuple):
    """A method that all ways have under the same name, and its arguments.

    A task of many passes is done `once`: it takes most of the time, and is an average by itself.
    """

    method: str
    arguments: tuple[Any, ...]
    once: bool = False

    def of(self, way: Any) -> Callable[[], Array]:
        """Return the task as one of the ways does it."""
        return partial(getattr(way, self.method), *self.arguments)


def tasks(service: Service) -> dict[str, Task]:
    """Return the tasks by name."""
    fact, store = service.ids(FACT), service.ids(INDIRECT_OBJECT)
    paris, mary, john = (service.token(text) for text in (" Paris", " Mary", " John"))
    some = np.random.default_rng(5).integers(1000, 20000, REPEATED).tolist()
    fifty = [service.ids(text) for text in FIFTY]
    step = max(1, service.layers // EDITED_LAYERS)
    layers = range(0, step * EDITED_LAYERS, step)
    return {
        "fact: lens after every layer": Task("lens", (fact,)),
        "fact: contributions of heads and neurons": Task("contributions", (fact,)),
        "indirect object: every head zeroed": Task(
            "knock_outs",
            (
                store,
                mary,
                john,
            ),
            once=True,
        ),
        "induction: patterns of all heads": Task("induction", (some + some,)),
        "gradient: FF2's VJPs, projected": Task(
            "gradient",
            (
                fact,
                paris,
            ),
        ),
        "edits: 7 layers x 3 rates": Task(
            "edits",
            (
                fact,
                paris,
                layers,
            ),
            once=True,
        ),
        "fifty prompts: lens after every layer": Task("lenses", (fifty,), once=True),
    }


def difference(one: Array, other: Array) -> str:
    """Say how far two results are apart: the largest difference, or equal tokens in percent."""
    if np.issubdtype(one.dtype, np.integer):
        return f"{(one == other).mean():.1%} of tokens equal"
    return f"{np.abs(one - other).max():.0e}"


def timed(
    actions: Mapping[str, Callable[[], Array]], rounds: int
) -> tuple[dict[str, float], dict[str, Array]]:
    """Return the median processor seconds of each action over alternating rounds, and its result.

    Processor time depends less on other programs than time on the clock.
    """
    results: dict[str, Array] = {}
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            started = _processor_seconds()
            results[name] = action()
            taken[name].append(_processor_seconds() - started)
    return {name: statistics.median(times) for name, times in taken.items()}, results


def _processor_seconds() -> float:
    """Return the processor time of this process and of the server that it started."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(found.user + found.system for found in times)


def measure(folder: Path, rounds: int, threads: int, lens: bool, only: Sequence[str]) -> None:
    """Print a table with a row for each task."""
    plain = Plain(folder)
    with januslens.launch(f"model={folder}", threads=threads, progress=None) as client:
        service = Service(client)
        ways: dict[str, Any] = {"service": service, "plain": plain}
        if lens:
            ways["TransformerLens"] = TransformerLens(folder)
        for way in ways.values():  # the first passes of a process are slow
            way.lens(service.ids(FACT))
        click.echo(
            f"\n{folder.name} | " + " | ".join(ways) + " | service / plain | differences from plain"
        )
        for name, task in tasks(service).items():
            if only and task.method not in only:
                continue
            done = {way: task.of(made) for way, made in ways.items() if hasattr(made, task.method)}
            taken, results = timed(done, 1 if task.once else rounds)
            apart = [difference(results[way], results["plain"]) for way in done if way != "plain"]
            cells = [f"{taken[way]:.2f}" if way in taken else "" for way in ways]
            ratio = f"{taken['service'] / taken['plain']:.2f}"
            click.echo(" | ".join([name, *cells, ratio, ", ".join(apart)]))


@click.command(help="Time a researcher's day on the checkpoints of `make real`.")
@click.option("--rounds", default=3, show_default=True, help="Turns that each way takes.")
@click.option("--threads", default=2, show_default=True, help="Cores to use.")
@click.option(
    "--transformer-lens",
    "lens",
    type=click.Path(exists=True, file_okay=False),
    help="The site-packages of an environment with TransformerLens.",
)
@click.option(
    "--model", type=click.Choice(["smollm2", "gemma3"]), multiple=True, help="Only these."
)
@click.option("--task", multiple=True, metavar="METHOD", help="Only these, such as lens or edits.")
def main(
    rounds: int, threads: int, lens: str | None, model: Sequence[str], task: Sequence[str]
) -> None:
    """Measure both checkpoints."""
    if lens is not None:
        sys.path.append(lens)  # after the packages that are installed here
    torch.set_num_threads(threads)
    click.echo(machine(threads))
    for folder in (SMOLLM, GEMMA):
        if not model or folder.name in model:
            measure(folder, rounds, threads, lens is not None, task)


if __name__ == "__main__":
    main()

"""Run a model on one prompt, forward or forward and backward, and capture activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from januslens_server import telemetry
from januslens_server.capture import (
    End,
    LayerActivations,
    StreamActivations,
    Tap,
    capturing,
    interruptible,
)
from januslens_server.capture.hooks import nth_tensor, returning, rows
from januslens_server.errors import CancelCheck
from januslens_server.lens.backward_lens import Loss
from januslens_server.models.experts import ExpertMatrices
from januslens_server.models.failures import check_gradients, check_pass
from januslens_server.models.graph_inputs import (
    kept_rows,
    layer_activations,
    layer_taps,
    stream_activations,
    sum_gradients,
    sum_taps,
)
from januslens_server.models.interventions import (
    GenerationState,
    Intervention,
    Interventions,
    Source,
)
from januslens_server.models.matrices import Factors, MatrixKey, loaded_weights
from januslens_server.models.resident import ResidentModel
from januslens_server.models.sites import SiteKey, site_experts, site_tap
from januslens_server.models.views import Block, CoarseBlock
from januslens_server.results import MatrixKind
from januslens_server.specs import Site
from januslens_server.transfer import DeviceIndex, to_device

# float16 gradients below 6e-8 become 0. Scaling the loss by a power of two, which divides out
# exactly, preserves them. The largest VJPs measured are a factor of 18 below float16's maximum
# (docs/semantics.md).
LOSS_SCALE = {torch.float16: 1024.0}


# Fields of `LayerActivations` with what enters the rotation, where interventions changed it.
MAPPED = {"mapped_query": Site.QUERY, "mapped_key": Site.KEY}


@dataclass(frozen=True)
class ForwardPass:
    """The result of a forward pass.

    `residual` is the last block's output `[pos, d_model]`, `logits` the model's own logits
    `[scored, vocab]` at the scored positions.
    """

    residual: torch.Tensor
    logits: torch.Tensor
    _blocks: Sequence[Block | CoarseBlock]
    _captured: dict[int, dict[str, torch.Tensor]]
    _positions: Sequence[int]
    _interventions: Interventions | None = None
    _gradients: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def layer(self, layer: int) -> LayerActivations:
        """The activations of a captured layer at the captured positions.

        Raises `TypeError` if its parts are unknown; `stream` has what was captured.
        """
        changes, block = self._interventions, self._blocks[layer]
        if isinstance(block, CoarseBlock):
            raise TypeError(f"layer {layer} has no known parts: expected a call of stream")
        return layer_activations(
            block,
            self._captured[layer],
            len(self.residual),
            self._positions,
            changes.hidden_sources(layer) if changes else None,
            self._replaced(layer),
            self._gradients.get(layer),
            changes.neuron_change(layer) if changes else None,
        )

    def stream(self, layer: int) -> StreamActivations:
        """The residual stream around a captured layer at the captured positions."""
        return stream_activations(
            self._blocks[layer],
            self._captured[layer],
            self._positions,
            self._replaced(layer),
            self._gradients.get(layer),
        )

    def _replaced(self, layer: int) -> frozenset[str]:
        changes = self._interventions
        return frozenset(site.name for site in changes.sites(layer)) if changes else frozenset()

    def release(self, layer: int) -> None:
        """Free the captured tensors of a layer."""
        self._captured.pop(layer, None)
        self._gradients.pop(layer, None)


@dataclass(frozen=True)
class AttentionVjp:
    """What the gradients of one layer's attention are computed from, each `[pos, heads, width]`.

    `query` and `key` are before rotation. `result_gradient` is the gradient of the loss with
    respect to the heads' results before any gate and before interventions change them, in float32.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    result_gradient: torch.Tensor


@dataclass(frozen=True)
class BackwardPass:
    """The loss, the factors of its gradients, and the last block's output `[pos, d_model]`.

    Factors are in the order of the requested matrices, experts by number. `attention` has the
    layers whose attention was requested.
    """

    loss: float
    factors: dict[MatrixKey, Factors]
    residual: torch.Tensor
    attention: dict[int, AttentionVjp]


@torch.inference_mode()
def read_sites(
    model: ResidentModel,
    ids: Sequence[int],
    rows_of: Mapping[SiteKey, Sequence[int]],
    scored: Sequence[int],
    check_cancelled: CancelCheck,
    interventions: Interventions | None = None,
    experts: Sequence[int] | None = None,
) -> tuple[dict[SiteKey, torch.Tensor], torch.Tensor]:
    """Run a prompt and return values of sites `[rows, ...]`, and logits `[scored, vocab]`.

    `rows_of` has the positions to keep of each site, which `site_tap` must know, or which are the
    neurons of experts. Of those, the values are `[rows, experts, d_mlp]` in float32.

    Raises:
        NotFinite: The last residual or the logits are infinite or NaN.
    """
    mixtures = {key: found for key in rows_of if (found := site_experts(model, key))}
    sites = {key: site_tap(model, key) for key in rows_of if key not in mixtures}
    neuron_taps = {
        (key, i): tap for key, found in mixtures.items() for i, tap in enumerate(found.neuron_taps)
    }

    at = {key: DeviceIndex(positions) for key, positions in rows_of.items()}

    def keep_rows(key: tuple[SiteKey, int], tapped: torch.Tensor) -> torch.Tensor:
        return rows(tapped)[at[key[0]].on(tapped.device)]

    def keep(key: SiteKey, tapped: torch.Tensor) -> torch.Tensor:
        values = sites[key].values(tapped)
        # A copy, because models change some tensors in place.
        return values.index_select(0, at[key].on(values.device))

    modules = [block.module for block in model.view.blocks]
    last = Tap(model.view.blocks[-1].module, End.OUTPUT)
    taps = {key: site.tap for key, site in sites.items()}
    with (
        changed(interventions),
        capturing({"residual": last}) as residual,
        capturing(taps, check_cancelled, modules, keep) as values,
        capturing(neuron_taps, keep=keep_rows) as routed,
    ):
        logits = _run(model, ids, scored, check_cancelled)[0]
    check_pass(rows(residual["residual"]), logits)
    for key, found in mixtures.items():
        check_cancelled()
        x, chosen = routed[key, 0], routed[key, 1]
        values[key] = found.neurons(
            x,
            chosen,
            range(found.count) if experts is None else experts,
            at[key].on(x.device),
            interventions.neuron_change(key[0]) if interventions else None,
        )
    return values, logits


@torch.inference_mode()
def block_outputs(
    model: ResidentModel,
    ids: Sequence[int],
    interventions: Interventions | None,
    scored: Sequence[int],
    check_cancelled: CancelCheck,
) -> tuple[list[Any], torch.Tensor]:
    """Run a prompt; return what each block returns, and logits `[scored, vocab]`.

    Raises:
        NotFinite: The last residual or the logits are infinite or NaN.
    """
    blocks = [block.module for block in model.view.blocks]
    outputs: list[Any] = []
    with changed(interventions), capturing({}, check_cancelled, blocks), ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(returning(block, outputs.append))
        logits = _run(model, ids, scored, check_cancelled)[0]
    check_pass(rows(nth_tensor(outputs[-1])), logits)
    return outputs, logits


@torch.inference_mode()
def copies(
    model: ResidentModel,
    ids: Sequence[int],
    count: int,
    interventions: Interventions,
    lowest: int,
    outputs: Sequence[Any],
    scored: Sequence[int],
    check_cancelled: CancelCheck,
) -> torch.Tensor:
    """Run `count` copies of a prompt as a batch; return logits `[count, scored, vocab]`.

    Blocks below the `lowest` do not run; the result of the last of them is in `outputs`, which
    are those of `block_outputs`.

    Raises:
        NotFinite: The last residual or the logits of a copy are infinite or NaN.
    """
    blocks = [block.module for block in model.view.blocks]
    telemetry.TOKENS.labels(model.name).inc(count * len(ids))
    batch = _batch(model, ids).expand(count, -1)
    last = Tap(blocks[-1], End.OUTPUT)
    with (
        _skipped(blocks[:lowest], outputs[lowest - 1], count),
        interventions.active(),
        capturing({"residual": last}, check_cancelled, blocks) as captured,
        head_at(model, scored, len(ids)),
        interruptible(check_cancelled, count * len(ids)),
    ):
        logits: torch.Tensor = model.network(input_ids=batch, use_cache=False).logits
    check_pass(rows(captured["residual"]), logits.flatten(0, 1))
    return logits


@contextmanager
def _skipped(blocks: Sequence[nn.Module], output: Any, count: int) -> Iterator[None]:
    """Replace blocks by a function that returns a known output for each copy of the prompt."""

    def of_copies(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape[:1] != (1,):
            return value
        return value.expand(count, *value.shape[1:])

    def known(*_args: Any, **_named: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return of_copies(output)
        return tuple(of_copies(value) for value in output)

    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = known
    try:
        yield
    finally:
        for block, forward_before in zip(blocks, before, strict=True):
            if forward_before is None:
                del block.forward
            else:
                block.forward = forward_before


@torch.inference_mode()
def forward(
    model: ResidentModel,
    ids: Sequence[int],
    layers: Iterable[int],
    check_cancelled: CancelCheck,
    positions: Sequence[int] | None = None,
    scored: Sequence[int] | None = None,
    interventions: Interventions | None = None,
) -> ForwardPass:
    """Run a prompt and capture activations.

    Args:
        model: The model.
        ids: Token ids of the prompt.
        layers: Layers to capture.
        check_cancelled: Called before every block and inside long ones; may raise to stop.
        positions: Positions to capture, in ascending order; None for all.
        scored: Positions to compute logits at; None for all.
        interventions: Changes of the pass, if any.

    Raises:
        NotFinite: The last residual or the logits are infinite or NaN.
    """
    with changed(interventions):
        return _captured_pass(model, ids, layers, check_cancelled, positions, scored, interventions)


# The number that a backward pass differentiates: a function of the last block's output `[pos,
# d_model]` and of the logits `[scored, vocab]` in float32.
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def differentiated(
    model: ResidentModel,
    ids: Sequence[int],
    layers: Iterable[int],
    score: Score,
    check_cancelled: CancelCheck,
    positions: Sequence[int],
    scored: Sequence[int],
    interventions: Interventions | None = None,
) -> ForwardPass:
    """Run a prompt as `forward` does, and a backward pass that adds the gradients of all sums.

    The sums are those of the residual stream in the captured layers, after any change. `score`
    gets a residual without a gradient.

    Raises:
        NotFinite: The residual, the logits or a gradient are infinite or NaN.
    """
    blocks = model.view.blocks
    layers = tuple(layers)
    taps = {(i, name): tap for i in layers for name, tap in sum_taps(blocks[i]).items()}

    def keep(_key: tuple[int, str], tensor: torch.Tensor) -> torch.Tensor:
        # An intervention may have replaced the sum by a tensor that does not require a gradient.
        if not tensor.requires_grad:
            tensor.requires_grad_()
        tensor.register_hook(lambda _gradient: check_cancelled())
        return tensor

    with torch.enable_grad(), ExitStack() as hooks:
        hooks.enter_context(_leaf_below(model, min(layers)))
        hooks.enter_context(changed(interventions))
        sums = hooks.enter_context(capturing(taps, None, (), keep))
        passed = _captured_pass(
            model, ids, layers, check_cancelled, positions, scored, interventions
        )
        value = score(passed.residual, passed.logits.float())
        scale = LOSS_SCALE.get(model.network.dtype, 1.0)
        found = _gradients(value * scale, list(sums.values()))
    check_gradients([value.detach(), *found])
    at = DeviceIndex(positions)
    gradients: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in layers}
    for (layer, name), gradient in zip(sums, found, strict=True):
        gradients[layer][name] = rows(gradient)[at.on(gradient.device)].float() / scale
    return replace(
        passed,
        logits=passed.logits.detach(),
        _gradients={i: sum_gradients(blocks[i], found) for i, found in gradients.items()},
    )


def _captured_pass(
    model: ResidentModel,
    ids: Sequence[int],
    layers: Iterable[int],
    check_cancelled: CancelCheck,
    positions: Sequence[int] | None,
    scored: Sequence[int] | None,
    interventions: Interventions | None,
) -> ForwardPass:
    """Run a prompt and capture activations as `forward` does; only logits have a gradient.

    The `interventions` are active already.
    """
    blocks = model.view.blocks
    everywhere = range(len(ids))
    positions = everywhere if positions is None else positions
    scored = everywhere if scored is None else scored
    index = DeviceIndex(positions)
    captured: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in layers}
    taps = {(i, name): tap for i in captured for name, tap in layer_taps(blocks[i]).items()}
    taps[-1, "residual"] = Tap(blocks[-1].module, End.OUTPUT)

    mapped = {
        (layer, name): site_tap(model, (layer, site))
        for layer in captured
        for name, site in MAPPED.items()
        if interventions and site in interventions.sites(layer)
    }
    taps |= {key: site.tap for key, site in mapped.items()}

    def keep(key: tuple[int, str], tensor: torch.Tensor) -> torch.Tensor:
        layer, name = key
        tensor = tensor.detach()
        if key in mapped:
            tensor = mapped[key].values(tensor).flatten(1)
        return tensor if layer < 0 else kept_rows(name, tensor, index)

    modules = [block.module for block in blocks]
    with capturing(taps, check_cancelled, modules, keep) as tensors:
        logits = _run(model, ids, scored, check_cancelled)[0]
    residual = rows(tensors.pop((-1, "residual"))).to(model.device)
    check_pass(residual, logits.detach())
    for (layer, name), tensor in tensors.items():
        captured[layer][name] = tensor
    return ForwardPass(residual, logits, blocks, captured, positions, interventions)


def backward(
    model: ResidentModel,
    ids: Sequence[int],
    loss: Loss,
    matrices: Iterable[tuple[int, MatrixKind | str]],
    check_cancelled: CancelCheck,
    interventions: Interventions | None = None,
    attention: Collection[int] = (),
) -> BackwardPass:
    """Run a prompt forward and backward, and return the factors of matrices' gradients.

    Parameters stay frozen. The only leaf that requires a gradient is the input of the lowest
    requested layer; the VJPs are the gradients of modules' outputs.

    Args:
        model: The model.
        ids: Token ids of the prompt.
        loss: The loss, a function of the last logits `[n, vocab]`.
        matrices: Layer, and kind or name of the module, of each requested matrix.
        check_cancelled: Called at every block of both passes and inside long ones; may raise to
            stop.
        interventions: Changes of the pass, if any. Gradients are those of the changed pass, with
            respect to the modules' outputs before any change.
        attention: Layers whose attention is differentiated as well.

    Raises:
        NotFinite: The residual, the logits or a gradient are infinite or NaN.
    """
    blocks = model.view.blocks
    sources = {key: model.view.source(*key) for key in matrices}
    if interventions:
        for (layer, kind), source in sources.items():
            if isinstance(source, ExpertMatrices):
                change = interventions.neuron_change(layer)
                sources[layer, kind] = replace(source, change=change)
    lowest = min((*(layer for layer, _ in sources), *attention), default=0)
    wanted = {source.whole for source in sources.values()}
    taps = {tap: tap for source in sources.values() for tap in source.taps if tap not in wanted}
    outputs = [Tap(block.module, End.OUTPUT) for block in blocks[lowest:]]
    taps |= {tap: tap for tap in outputs}
    modules = [block.module for block in blocks]
    inputs = {
        (layer, site): site_tap(model, (layer, site))
        for layer in attention
        for site in (Site.QUERY, Site.KEY, Site.VALUE)
    }
    results = {layer: site_tap(model, (layer, Site.HEAD_RESULT)) for layer in attention}
    gates = {layer: gate for layer in attention if (gate := model.view.attention(layer).gate)}

    def keep(key: SiteKey, tapped: torch.Tensor) -> torch.Tensor:
        return inputs[key].values(tapped.detach()).clone()  # some models change it in place

    with (
        torch.enable_grad(),
        capturing({tap: tap for tap in wanted}) as own,  # before interventions change them
        changed(interventions, BEFORE_RESULTS),
        capturing({layer: site.tap for layer, site in results.items()}) as mixed,
        changed(interventions, FROM_RESULTS),
        capturing(taps, check_cancelled, modules) as captured,
        capturing({key: site.tap for key, site in inputs.items()}, keep=keep) as attended,
        capturing({layer: gate.linear.output for layer, gate in gates.items()}) as opened,
    ):
        with _leaf_below(model, lowest):
            scored = range(len(ids))[-loss.positions :]
            logits = _run(model, ids, scored, check_cancelled)[0].float()
        residual = rows(captured[outputs[-1]]).detach().to(model.device)
        check_pass(residual, logits.detach())
        value = loss(logits)
        scale = LOSS_SCALE.get(model.network.dtype, 1.0)
        for tensor in (*own.values(), *(captured[tap] for tap in outputs)):
            if tensor.requires_grad:
                tensor.register_hook(lambda _gradient: check_cancelled())
        gradients = _gradients(value * scale, [*own.values(), *mixed.values()])
    check_gradients([value.detach(), *gradients])
    of_outputs, of_results = gradients[: len(own)], gradients[len(own) :]
    vjps = {tap: rows(gradient) for tap, gradient in zip(own, of_outputs, strict=True)}
    factors = {
        (layer, kind, expert): found.to(model.device)
        for (layer, kind), source in sources.items()
        for expert, found in source.factors(captured, vjps[source.whole].float() / scale).items()
    }
    result_gradients = {
        layer: results[layer].values(gradient).float() / scale
        for layer, gradient in zip(mixed, of_results, strict=True)
    }
    for layer, gate in gates.items():  # HEAD_RESULT is behind the gate
        result_gradients[layer] *= gate(opened[layer].detach(), model.view.facts.n_heads)
    of_attention = {
        layer: AttentionVjp(
            query=attended[layer, Site.QUERY],
            key=attended[layer, Site.KEY],
            value=attended[layer, Site.VALUE],
            result_gradient=result_gradients[layer],
        )
        for layer in attention
    }
    return BackwardPass(value.item(), factors, residual, of_attention)


def dense_gradient(
    model: ResidentModel,
    ids: Sequence[int],
    loss: Loss,
    key: MatrixKey,
    check_cancelled: CancelCheck,
    interventions: Interventions | None = None,
) -> torch.Tensor:
    """Compute dL/dW `[d_in, d_out]` of one matrix in float32, by autograd on the weight itself.

    For this pass an alias that requires a gradient replaces the weight. The model's parameter
    stays frozen.
    """
    matrix = model.view.matrix(key)
    modules = [block.module for block in model.view.blocks]
    scored = range(len(ids))[-loss.positions :]
    with (
        loaded_weights(matrix.module),
        torch.enable_grad(),
        changed(interventions),
        capturing({}, check_cancelled, modules),
    ):
        weight = matrix.parameter()
        name = next(name for name, p in model.network.named_parameters() if p is weight)
        alias = weight.detach().requires_grad_()
        with head_at(model, scored, len(ids)), interruptible(check_cancelled, len(ids)):
            logits = torch.func.functional_call(
                model.network,
                {name: alias},
                kwargs={"input_ids": _batch(model, ids), "use_cache": False},
            ).logits
        scale = LOSS_SCALE.get(model.network.dtype, 1.0)
        (gradient,) = _gradients(loss(logits[0].float()) * scale, [alias])
    return matrix.rows_of(gradient, key[2]).to(model.device).float() / scale


def _gradients(value: torch.Tensor, at: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Compute the gradients of a number; 0 where it does not depend on a tensor."""
    leading = [tensor for tensor in at if tensor.requires_grad]  # an indexer runs without gradients
    if not value.requires_grad or not leading:  # interventions cut every path
        return [torch.zeros_like(tensor) for tensor in at]
    found = iter(torch.autograd.grad(value, leading, allow_unused=True, materialize_grads=True))
    return [next(found) if tensor.requires_grad else torch.zeros_like(tensor) for tensor in at]


# The sites before the heads' results, and the others, in the order of the pass.
BEFORE_RESULTS = frozenset(site for site in Site if site < Site.HEAD_RESULT)
FROM_RESULTS = frozenset(Site) - BEFORE_RESULTS


def changed(
    interventions: Interventions | None, sites: Collection[Site] = frozenset(Site)
) -> AbstractContextManager[None]:
    """Change some sites of the forward passes inside the context, if there are interventions."""
    return interventions.active(sites) if interventions else nullcontext()


def prepared(
    model: ResidentModel,
    interventions: Sequence[Intervention],
    length: int,
    check_cancelled: CancelCheck,
) -> Interventions | None:
    """Run the prompts that interventions take values from, each once.

    Returns the changes of a pass over a prompt of `length` tokens, or None if there are none.
    """
    if not interventions:
        return None
    taken = taken_values(model, interventions, check_cancelled)
    return Interventions(model, interventions, length, taken, check_cancelled)


def generation_changes(
    model: ResidentModel,
    interventions: Sequence[Intervention],
    check_cancelled: CancelCheck,
) -> Callable[[int, int], Interventions | None]:
    """Run the prompts that interventions take values from, each once.

    Returns a function from the first position and the length of a generation's pass to its changes.
    """
    taken = taken_values(model, interventions, check_cancelled)
    state = GenerationState()

    def changes(start: int, length: int) -> Interventions | None:
        if not interventions:
            return None
        here = [found.in_pass(start, length) for found in interventions]
        return Interventions(model, here, length, taken, check_cancelled, start=start, state=state)

    return changes


def taken_values(
    model: ResidentModel, interventions: Sequence[Intervention], check_cancelled: CancelCheck
) -> dict[tuple[int, SiteKey], torch.Tensor]:
    """Return the values that interventions take from other prompts, by number and site."""
    needed: dict[tuple[int, ...], dict[SiteKey, set[int]]] = {}
    for intervention in interventions:
        for source in intervention.sources:
            for key in intervention.keys:
                rows_of = needed.setdefault(source.ids, {})
                rows_of.setdefault(key, set()).update(source.positions)
    found: dict[tuple[tuple[int, ...], SiteKey], tuple[list[int], torch.Tensor]] = {}
    for ids, wanted in needed.items():
        at = {key: sorted(positions) for key, positions in wanted.items()}
        values, _ = read_sites(model, ids, at, (len(ids) - 1,), check_cancelled)
        found |= {(ids, key): (at[key], values[key]) for key in at}

    def rows_from(source: Source, key: SiteKey) -> torch.Tensor:
        positions, values = found[source.ids, key]
        return values[to_device(np.searchsorted(positions, source.positions), values.device)]

    taken: dict[tuple[int, SiteKey], torch.Tensor] = {}
    for number, intervention in enumerate(interventions):
        for key in intervention.keys if intervention.sources else ():
            taken[number, key] = _mean(
                intervention, [rows_from(source, key) for source in intervention.sources]
            )
    return taken


def _mean(intervention: Intervention, values: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean of the sources' values `[pos or 1, ...]`, over the units that change."""
    if intervention.over_positions:
        whole = torch.cat(values).float().mean(0, keepdim=True)
    else:
        whole = values[0] if len(values) == 1 else torch.stack(values).float().mean(0)
    return intervention.chosen(whole)


@contextmanager
def _leaf_below(model: ResidentModel, layer: int) -> Iterator[None]:
    """Make the input of a block require a gradient, because all parameters are frozen.

    Autograd then stores no tensors of the layers below.
    """

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        # A copy, because the operations counter of torch fails if a module's input is a leaf.
        return tensor.detach().requires_grad_().clone()

    def after_embedding(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return leaf(output)

    def before_block(
        _module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (leaf(args[0]), *args[1:]), named
        return args, named | {"hidden_states": leaf(named["hidden_states"])}

    if layer == 0:
        handle = model.view.embedding.register_forward_hook(after_embedding)
    else:
        module = model.view.blocks[layer].module
        handle = module.register_forward_pre_hook(before_block, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_at(model: ResidentModel, positions: Sequence[int], length: int) -> Iterator[None]:
    """Compute logits only at these positions of a prompt of `length` tokens."""
    if len(positions) == length:
        yield
        return

    def pick(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        index = to_device(positions, args[0].device)
        return (args[0].index_select(-2, index), *args[1:])

    handle = model.network.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _run(
    model: ResidentModel, ids: Sequence[int], scored: Sequence[int], check_cancelled: CancelCheck
) -> torch.Tensor:
    """Run the model and return logits `[1, scored, vocab]`."""
    telemetry.TOKENS.labels(model.name).inc(len(ids))
    with head_at(model, scored, len(ids)), interruptible(check_cancelled, len(ids)):
        logits: torch.Tensor = model.network(input_ids=_batch(model, ids), use_cache=False).logits
    return logits


def _batch(model: ResidentModel, ids: Sequence[int]) -> torch.Tensor:
    return to_device([ids], model.device)

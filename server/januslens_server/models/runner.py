"""Running a resident model once, forward or forward and backward, with capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from januslens_server import telemetry
from januslens_server.capture import End, LayerActivations, Tap, capturing
from januslens_server.capture.taps import rows
from januslens_server.errors import CancelCheck
from januslens_server.models.factors import Factors, MatrixKey
from januslens_server.models.finite import check_gradients, check_pass
from januslens_server.models.layer_capture import layer_activations, layer_taps
from januslens_server.models.offload import held
from januslens_server.models.resident import ResidentModel
from januslens_server.results import MatrixKind

# float16 gradients below 6e-8 vanish. Scaled by a power of two, which divides out exactly, small
# VJPs keep their bits: the largest seen leave a factor of 18 to float16's end (docs/semantics.md).
LOSS_SCALE = {torch.float16: 1024.0}

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ForwardPass:
    """Activations of the asked-for layers, the last block's output and the model's own logits.

    `residual` is `[pos, d_model]`, `logits` `[pos, vocab]`.
    """

    layers: dict[int, LayerActivations]
    residual: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class BackwardPass:
    """The loss, its factors by matrix, and the last block's output `[pos, d_model]`.

    The factors come in the order of the matrices that were asked for, experts by number.
    """

    loss: float
    factors: dict[MatrixKey, Factors]
    residual: torch.Tensor


@torch.inference_mode()
def forward(
    model: ResidentModel, ids: Sequence[int], layers: Iterable[int], check_cancelled: CancelCheck
) -> ForwardPass:
    """Run the prompt once. `check_cancelled` is called before every block and may raise to stop.

    Raises `NotFinite` if the pass ends in no numbers.
    """
    blocks = model.view.blocks
    layers = tuple(layers)
    taps = {(i, name): tap for i in layers for name, tap in layer_taps(blocks[i]).items()}
    taps[-1, "residual"] = Tap(blocks[-1].module, End.OUTPUT)
    with capturing(taps, check_cancelled, [block.module for block in blocks]) as captured:
        logits = _run(model, ids)[0]
    residual = rows(captured[-1, "residual"]).to(model.device)
    check_pass(residual, logits)
    return ForwardPass(
        layers={
            i: layer_activations(
                blocks[i],
                {name: tensor for (layer, name), tensor in captured.items() if layer == i},
                len(ids),
            )
            for i in layers
        },
        residual=residual,
        logits=logits,
    )


def backward(
    model: ResidentModel,
    ids: Sequence[int],
    loss: Loss,
    matrices: Iterable[tuple[int, MatrixKind]],
    check_cancelled: CancelCheck,
) -> BackwardPass:
    """Run the prompt forward and one backward pass that touches activations only.

    Parameters stay frozen: the embedding's output is the one leaf that asks for a gradient, and
    the VJPs are the gradients of modules' outputs. `matrices` are layers and kinds; `loss` takes
    logits `[pos, vocab]` in float32 and gives a scalar.

    Raises `NotFinite` if the forward pass ends in no numbers, or a gradient does.
    """
    blocks = model.view.blocks
    sources = {(layer, kind): blocks[layer].matrices[kind] for layer, kind in matrices}
    taps = {tap: tap for source in sources.values() for tap in source.taps}
    last = Tap(blocks[-1].module, End.OUTPUT)
    modules = [block.module for block in blocks]
    with torch.enable_grad(), capturing(taps | {last: last}, check_cancelled, modules) as captured:
        with _leaf_at(model.view.embedding):
            logits = _run(model, ids)[0].float()
        residual = rows(captured[last]).detach().to(model.device)
        check_pass(residual, logits.detach())
        value = loss(logits)
        scale = LOSS_SCALE.get(model.network.dtype, 1.0)
        wanted = {source.whole for source in sources.values()}
        vjps = _vjps(value * scale, wanted, captured, check_cancelled)
    check_gradients(vjps.values())
    factors = {
        (layer, kind, expert): found.to(model.device)
        for (layer, kind), source in sources.items()
        for expert, found in source.factors(captured, vjps[source.whole].float() / scale).items()
    }
    return BackwardPass(value.item(), factors, residual)


def dense_gradient(
    model: ResidentModel, ids: Sequence[int], loss: Loss, key: MatrixKey
) -> torch.Tensor:
    """dL/dW `[d_in, d_out]` of one matrix by autograd on the weight itself, as float32.

    The weight is replaced for this one pass by an alias that asks for a gradient: the resident
    parameter stays frozen.
    """
    layer, kind, expert = key
    matrix = model.view.blocks[layer].matrices[kind]
    with held(matrix.module), torch.enable_grad():
        weight = matrix.parameter()
        name = next(name for name, p in model.network.named_parameters() if p is weight)
        alias = weight.detach().requires_grad_()
        output = torch.func.functional_call(
            model.network,
            {name: alias},
            kwargs={"input_ids": _batch(model, ids), "use_cache": False},
        )
        scale = LOSS_SCALE.get(model.network.dtype, 1.0)
        (gradient,) = torch.autograd.grad(loss(output.logits[0].float()) * scale, [alias])
    return matrix.rows_of(gradient, expert).to(model.device).float() / scale


def _vjps(
    value: torch.Tensor,
    taps: set[Tap],
    captured: Mapping[Tap, torch.Tensor],
    check_cancelled: CancelCheck,
) -> dict[Tap, torch.Tensor]:
    """dL/dy `[pos, d_out]` of every tapped output; `check_cancelled` is called on the way."""
    ordered = list(taps)
    outputs = [captured[tap] for tap in ordered]
    for output in outputs:
        output.register_hook(lambda _gradient: check_cancelled())
    gradients = torch.autograd.grad(value, outputs)
    return {tap: rows(gradient) for tap, gradient in zip(ordered, gradients, strict=True)}


@contextmanager
def _leaf_at(embedding: nn.Module) -> Iterator[None]:
    """Make the embedding's output ask for a gradient: with frozen parameters nothing else does."""

    def ask(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    handle = embedding.register_forward_hook(ask)
    try:
        yield
    finally:
        handle.remove()


def _run(model: ResidentModel, ids: Sequence[int]) -> torch.Tensor:
    telemetry.TOKENS.labels(model.name).inc(len(ids))
    logits: torch.Tensor = model.network(input_ids=_batch(model, ids), use_cache=False).logits
    return logits


def _batch(model: ResidentModel, ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([ids], device=model.device)

"""PreviewEdit: what an edit would do, as low-rank overlays for this request alone."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from januslens_server.capture import LowRank, Overlay, capturing, overlaid
from januslens_server.capture.taps import rows
from januslens_server.errors import CancelCheck, InvalidRequest, NotFinite
from januslens_server.lens.losses import negative_log_likelihood
from januslens_server.models.matrices import Linear, MatrixKey, read_parameter
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import backward, forward
from januslens_server.pipelines.inputs import (
    choose_matrices,
    layer_matrices,
    read_layers,
    read_prompt,
    read_target,
)
from januslens_server.results import EditPreview, Effect, MatrixKind
from januslens_server.specs import DescentStep, ForwardShift, PreviewEditSpec


@dataclass(frozen=True)
class _Watched:
    """A prompt whose next token is looked at, before and after."""

    label: str
    ids: tuple[int, ...]
    target: int


def preview_edit(
    model: ResidentModel, spec: PreviewEditSpec, check_cancelled: CancelCheck
) -> Iterator[EditPreview | None]:
    """Yield the edit's effect on its own prompt and on every probe, and before it None.

    Raises `InvalidRequest` for inputs that this model cannot take, before anything is computed,
    and for an edit so large that the model's logits are no numbers any more.
    """
    targets = read_target(model, spec.target, "target")
    prompt = read_prompt(model, spec.prompt, room=len(targets) - 1)
    ids = tuple(token.id for token in prompt)
    watched = [_Watched("", ids, targets[0]), *_probes(model, spec, targets[0])]
    before = yield from _read(model, watched, (), check_cancelled)
    changes = _changes(model, spec, ids, targets, check_cancelled)
    after = yield from _edited(model, spec, watched, model.view.overlays(changes), check_cancelled)
    edited, *probes = map(_effect, watched, before, after)
    yield EditPreview(edited, probes, model.provenance)


def _edited(
    model: ResidentModel,
    spec: PreviewEditSpec,
    watched: Sequence[_Watched],
    overlays: Sequence[Overlay],
    check_cancelled: CancelCheck,
) -> Generator[None, None, list[torch.Tensor]]:
    """Every prompt's logits under the edit, which is refused where they are not finite."""
    field = "descent.learning_rate" if isinstance(spec.edit, DescentStep) else "shift.eta"
    larger = InvalidRequest(
        field, "edit too large: the edited model's logits are not finite; make it smaller"
    )
    try:
        rows = yield from _read(model, watched, overlays, check_cancelled)
    except NotFinite as error:
        raise larger from error
    if not all(bool(row.isfinite().all()) for row in rows):
        raise larger
    return rows


def _read(
    model: ResidentModel,
    watched: Sequence[_Watched],
    overlays: Sequence[Overlay],
    check_cancelled: CancelCheck,
) -> Generator[None, None, list[torch.Tensor]]:
    """Every prompt's logits; the overlays are on during its pass alone."""
    rows = []
    for prompt in watched:
        with overlaid(overlays):
            rows.append(_next_logits(model, prompt.ids, check_cancelled))
        yield
    return rows


def _probes(model: ResidentModel, spec: PreviewEditSpec, target: int) -> list[_Watched]:
    watched = []
    for i, probe in enumerate(spec.probes):
        field = f"probes[{i}]"
        tokens = read_prompt(model, probe.prompt, field=f"{field}.input")
        token = target
        if probe.target is not None:
            token = read_target(model, probe.target, f"{field}.target")[0]
        watched.append(_Watched(probe.label, tuple(token.id for token in tokens), token))
    return watched


def _changes(
    model: ResidentModel,
    spec: PreviewEditSpec,
    ids: Sequence[int],
    targets: Sequence[int],
    check_cancelled: CancelCheck,
) -> dict[MatrixKey, LowRank]:
    if isinstance(spec.edit, DescentStep):
        return _descent(model, spec.edit, ids, targets, check_cancelled)
    return _shift(model, spec.edit, ids, targets[0], check_cancelled)


def _descent(
    model: ResidentModel,
    step: DescentStep,
    ids: Sequence[int],
    targets: Sequence[int],
    check_cancelled: CancelCheck,
) -> dict[MatrixKey, LowRank]:
    """`W -= learning_rate dL/dW` from the gradient's factors, L the target's NLL."""
    layers = read_layers(model, step.layers, "descent.layers")
    kinds = choose_matrices(model, step.matrices, "descent.matrices").kinds
    forced = [*ids, *targets[:-1]]
    matrices = layer_matrices(model, layers, kinds)
    loss = negative_log_likelihood(targets)
    factors = backward(model, forced, loss, matrices, check_cancelled).factors
    return {
        key: LowRank(found.inputs, -step.learning_rate * found.vjps)
        for key, found in factors.items()
    }


def _shift(
    model: ResidentModel,
    shift: ForwardShift,
    ids: Sequence[int],
    target: int,
    check_cancelled: CancelCheck,
) -> dict[MatrixKey, LowRank]:
    """`FF2 += eta x_p^T e_t`: the paper's edit from the forward pass alone (section 7)."""
    n_layers = model.view.facts.n_layers
    if shift.layer >= n_layers:
        raise InvalidRequest("shift.layer", f"expected 0 to {n_layers - 1}, got {shift.layer}")
    linear = model.view.blocks[shift.layer].matrices[MatrixKind.FF2]
    if not isinstance(linear, Linear):
        raise InvalidRequest(
            "shift.layer", f"expected a layer with one FF2, got the experts of layer {shift.layer}"
        )
    embeddings = read_parameter(model.view.embedding, "weight")
    width = model.view.facts.d_model
    if embeddings.shape[1] != width:  # OPT may project them
        raise InvalidRequest(
            "shift", f"expected embeddings of width {width} to shift by, got {embeddings.shape[1]}"
        )
    with torch.inference_mode(), capturing({"x": linear.input}) as captured:
        forward(model, ids, (), check_cancelled, scored=(len(ids) - 1,))
    x = rows(captured["x"])[-1:].to(model.device).float()
    embedding = embeddings[target].to(model.device).float()
    change = LowRank(x, shift.eta * embedding[None])
    return {(shift.layer, MatrixKind.FF2, None): change}


@torch.inference_mode()
def _next_logits(
    model: ResidentModel, ids: Sequence[int], check_cancelled: CancelCheck
) -> torch.Tensor:
    """Logits of the next token `[vocab]`, in float32."""
    lens = model.view.lens
    last = forward(model, ids, (), check_cancelled, scored=(len(ids) - 1,)).residual[-1:]
    return lens.cap(lens.logits(lens.final_norm(last)))[0]


def _effect(watched: _Watched, before: torch.Tensor, after: torch.Tensor) -> Effect:
    """Ranks and predictions compare logits: rounding makes some log-probabilities equal."""
    target = watched.target
    log_before, log_after = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
    return Effect(
        label=watched.label,
        target_token_id=target,
        probability_before=float(log_before[target].exp()),
        probability_after=float(log_after[target].exp()),
        rank_before=int((before > before[target]).sum()),
        rank_after=int((after > after[target]).sum()),
        predicted_before=int(before.argmax()),  # the lowest id of equal logits
        predicted_after=int(after.argmax()),
        kl_bits=float((log_before.exp() * (log_before - log_after)).sum()) / math.log(2),
    )

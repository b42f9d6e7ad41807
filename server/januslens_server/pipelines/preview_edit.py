"""PreviewEdit: measure the effect of an edit, applied as low-rank overlays for one request."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial

import torch

from januslens_server.capture import LowRank, Overlay, capturing, overlaid
from januslens_server.capture.hooks import rows
from januslens_server.errors import CancelCheck, InvalidRequest, NotFinite
from januslens_server.lens.backward_lens import cosine, negative_log_likelihood
from januslens_server.lens.head import LensHead
from januslens_server.models.interventions import Interventions
from januslens_server.models.matrices import MatrixKey, read_parameter
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import backward, forward, prepared
from januslens_server.pipelines.edits import single_ff2
from januslens_server.pipelines.resolve import ResolvedPreviewEdit, Watched
from januslens_server.results import EditPreview, Effect, MatrixKind
from januslens_server.specs import DescentStep, ForwardShift, PreviewEditSpec


def preview_edit(
    request: ResolvedPreviewEdit, check_cancelled: CancelCheck
) -> Iterator[EditPreview | None]:
    """Yield the effects of each edit on its own prompt and on every probe.

    None is yielded after each pass. The passes before the edits run once, and so does the one that
    they are computed from.

    Raises `InvalidRequest` if the edit makes the model's logits infinite or NaN.
    """
    model, watched = request.model, request.watched
    # Patches and means take their values from the model without the edit.
    changes = [
        prepared(model, prompt.interventions, len(prompt.ids), check_cancelled)
        for prompt in watched
    ]
    before = yield from _read(model, watched, changes, (), check_cancelled)
    directions = _directions(request, check_cancelled)
    steps = _compared_steps(request, check_cancelled)
    effect = partial(_effect, model.view.lens)
    for edit in request.edits:
        changed = {
            key: LowRank(found.inputs, edit.strength * found.outputs)
            for key, found in directions.items()
            if key[:2] in edit.matrices
        }
        reading = _read(model, watched, changes, model.view.overlays(changed), check_cancelled)
        after = yield from _edited(request.spec, reading)
        edited, *probes = map(effect, watched, before, after)
        strength = None if edit.layer is None else edit.strength
        agreed = _gradient_cosine(changed, steps)
        yield EditPreview(edited, probes, model.provenance, edit.layer, strength, agreed)


def _edited(
    spec: PreviewEditSpec, reading: Generator[None, None, list[torch.Tensor]]
) -> Generator[None, None, list[torch.Tensor]]:
    """Return every prompt's logits with the edit; raises `InvalidRequest` if one is not finite."""
    field = "descent.learning_rate" if isinstance(spec.edit, DescentStep) else "shift.eta"
    if spec.grid is not None:
        field = "grid.strengths"
    larger = InvalidRequest(
        field, "edit too large: the edited model's logits are not finite; make it smaller"
    )
    try:
        rows = yield from reading
    except NotFinite as error:
        raise larger from error
    if not all(bool(row.isfinite().all()) for row in rows):
        raise larger
    return rows


def _read(
    model: ResidentModel,
    watched: Sequence[Watched],
    changes: Sequence[Interventions | None],
    overlays: Sequence[Overlay],
    check_cancelled: CancelCheck,
) -> Generator[None, None, list[torch.Tensor]]:
    """Return every prompt's logits, with the overlays active only during the passes."""
    rows = []
    for prompt, changed in zip(watched, changes, strict=True):
        with overlaid(changed.over_edits(overlays) if changed else overlays):
            rows.append(_next_logits(model, prompt.ids, changed, check_cancelled))
        yield
    return rows


def _directions(
    request: ResolvedPreviewEdit, check_cancelled: CancelCheck
) -> dict[MatrixKey, LowRank]:
    """Return the changes of the matrices by an edit with strength 1."""
    if isinstance(request.spec.edit, DescentStep):
        return _descent(request, check_cancelled)
    return _shift(request, check_cancelled)


def _descent(
    request: ResolvedPreviewEdit, check_cancelled: CancelCheck
) -> dict[MatrixKey, LowRank]:
    """Return the changes `-dL/dW` as factors; L is the target's NLL."""
    forced = [*request.watched[0].ids, *request.targets[:-1]]
    loss = negative_log_likelihood(request.targets)
    model, matrices = request.model, request.matrices
    changes = prepared(model, request.interventions, len(forced), check_cancelled)
    passed = backward(model, forced, loss, matrices, check_cancelled, changes)
    return {key: LowRank(found.inputs, -found.vjps) for key, found in passed.factors.items()}


def _compared_steps(
    request: ResolvedPreviewEdit, check_cancelled: CancelCheck
) -> dict[MatrixKey, LowRank]:
    """Return the descent steps that shifts are compared with; none unless requested."""
    edit = request.spec.edit
    if isinstance(edit, ForwardShift) and edit.gradient_cosine:
        return _descent(request, check_cancelled)
    return {}


def _gradient_cosine(
    changed: Mapping[MatrixKey, LowRank], steps: Mapping[MatrixKey, LowRank]
) -> float | None:
    """Return the cosine of a shift's change of its only matrix and the descent step on it."""
    for key, change in changed.items():
        if key in steps:
            step = steps[key]
            return cosine((change.inputs, change.outputs), (step.inputs, step.outputs))
    return None


def _shift(request: ResolvedPreviewEdit, check_cancelled: CancelCheck) -> dict[MatrixKey, LowRank]:
    """Return the changes `x_p^T e_t` of FF2, which need no backward pass (section 7)."""
    model, ids = request.model, request.watched[0].ids
    layers = [layer for layer, _ in request.matrices]
    inputs = {str(layer): single_ff2(model, layer).input for layer in layers}
    embeddings = read_parameter(model.view.embedding, "weight")
    width = model.view.facts.d_model
    if embeddings.shape[1] != width:  # some OPT models have narrower embeddings
        raise InvalidRequest(
            "shift",
            f"the embeddings of {model.name} have width {embeddings.shape[1]}; expected its "
            f"d_model {width}; use descent",
        )
    with torch.inference_mode(), capturing(inputs) as captured:
        changes = prepared(model, request.watched[0].interventions, len(ids), check_cancelled)
        last = (len(ids) - 1,)
        forward(model, ids, (), check_cancelled, scored=last, interventions=changes)
    embedding = embeddings[request.targets[0]].to(model.device).float()[None]
    return {
        (layer, MatrixKind.FF2, None): LowRank(
            rows(captured[str(layer)])[-1:].to(model.device).float(), embedding
        )
        for layer in layers
    }


@torch.inference_mode()
def _next_logits(
    model: ResidentModel,
    ids: Sequence[int],
    changes: Interventions | None,
    check_cancelled: CancelCheck,
) -> torch.Tensor:
    """Return the logits of the next token `[vocab]`, in float32, before the soft-cap."""
    lens = model.view.lens
    last = (len(ids) - 1,)
    passed = forward(model, ids, (), check_cancelled, scored=last, interventions=changes)
    last_residual = passed.residual[-1:]
    return lens.logits(lens.normed(last_residual))[0]


def _effect(lens: LensHead, watched: Watched, before: torch.Tensor, after: torch.Tensor) -> Effect:
    """Compare the logits before and after the edit.

    Ranks and predictions are computed before the soft-cap, which maps large logits to equal ones.
    """
    target = watched.target
    log_before, log_after = (lens.cap(row).log_softmax(dim=-1) for row in (before, after))
    figures = (
        log_before[target],
        log_after[target],
        log_before[target].exp(),
        log_after[target].exp(),
        (log_before.exp() * (log_before - log_after)).sum(),
        (before > before[target]).sum(),
        (after > after[target]).sum(),
        before.argmax(),  # of equal logits, the lowest id
        after.argmax(),
    )
    # One copy to the host; float64 represents float32 and token ids exactly.
    *floats, rank_before, rank_after, predicted_before, predicted_after = torch.stack(
        [figure.double() for figure in figures]
    ).tolist()
    log_p_before, log_p_after, p_before, p_after, divergence = floats
    return Effect(
        label=watched.label,
        target_token_id=target,
        probability_before=p_before,
        probability_after=p_after,
        rank_before=int(rank_before),
        rank_after=int(rank_after),
        predicted_before=int(predicted_before),
        predicted_after=int(predicted_after),
        kl_bits=divergence / math.log(2),
        log_probability_before=log_p_before,
        log_probability_after=log_p_after,
    )

"""GradientLens: gradients as factors, projected to the vocabulary (Katz et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from januslens_server.errors import CancelCheck
from januslens_server.lens.backward_lens import reconstruction_error
from januslens_server.models.interventions import Interventions
from januslens_server.models.matrices import MatrixKey
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import BackwardPass, backward, dense_gradient, prepared
from januslens_server.pipelines.attention_gradients import pieces
from januslens_server.pipelines.factor_readings import FactorReader
from januslens_server.pipelines.inputs import Objective
from januslens_server.pipelines.metrics import StageClock, read
from januslens_server.pipelines.resolve import ResolvedGradientLens
from januslens_server.results import (
    AttentionGradient,
    GradientEvent,
    GradientHeader,
    GradientSummary,
    Guarantee,
)
from januslens_server.specs import LensSpec

# Maximum relative error of `verify` (docs/semantics.md).
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}


def gradient_lens(
    request: ResolvedGradientLens, check_cancelled: CancelCheck
) -> Iterator[GradientEvent]:
    """Yield the header, then the layers from the last down, then the summary.

    The attention of a layer, if requested, comes before its matrices. `check_cancelled` is called
    before every block of the forward pass, at every matrix of the backward pass, and before every
    chunk of vectors. What it raises ends the request.
    """
    clock = StageClock("GradientLens")
    clock.add("tokenize", request.seconds)
    model, objective = request.model, request.objective
    with clock.stage("backward"):
        ids = [token.id for token in objective.tokens]
        changes = prepared(model, request.interventions, len(ids), check_cancelled)
        passed = backward(
            model,
            ids,
            objective.loss,
            request.matrices,
            check_cancelled,
            changes,
            request.attention_layers,
        )
        predicted = _predicted(model, passed, objective, check_cancelled)
    yield GradientHeader(
        provenance=model.provenance,
        facts=model.view.facts,
        prompt_tokens=objective.tokens,
        loss=passed.loss,
        target_token_ids=objective.targets,
        predicted_token_id=predicted,
        stage_data_types=_stage_data_types(model),
        skipped=request.skipped,
        limited_layers=request.limited_layers,
        layers_without_attention_gradients=request.without_attention,
    )
    reader = FactorReader(request, predicted, check_cancelled)
    for keys in reader.batches(passed.factors):
        check_cancelled()
        with clock.stage("project"):
            matrices_read = reader.matrices({key: passed.factors[key] for key in keys})
        for key, matrix in zip(keys, matrices_read, strict=True):
            yield from _attention(request, passed, key[0], clock, check_cancelled)
            if not request.spec.verify:
                yield matrix
                continue
            check_cancelled()
            with clock.stage("verify"):
                verified = _verified(model, objective, key, passed, changes, check_cancelled)
            yield replace(matrix, verification=verified)
    yield from _attention(request, passed, 0, clock, check_cancelled)
    yield GradientSummary(len(passed.factors), clock.times(), reader.segment_rows)


def _attention(
    request: ResolvedGradientLens,
    passed: BackwardPass,
    lowest: int,
    clock: StageClock,
    check_cancelled: CancelCheck,
) -> Iterator[AttentionGradient]:
    """Yield the attention that has not been sent of all layers from the last to the `lowest`."""
    for layer in [layer for layer in passed.attention if layer >= lowest]:
        vjp = passed.attention.pop(layer)
        yield from pieces(request, layer, vjp, clock, check_cancelled)


@torch.inference_mode()
def _predicted(
    model: ResidentModel, passed: BackwardPass, objective: Objective, check_cancelled: CancelCheck
) -> int:
    """Return the token that the model predicts after the prompt."""
    last = passed.residual[objective.prompt_length - 1][None]
    table = read(model.view.lens, last, LensSpec(top_k=1, bottom_k=0), None, check_cancelled)
    return int(table.top_ids[0, 0])


def _stage_data_types(model: ResidentModel) -> dict[str, str]:
    """Return the data types: the model's own for both passes, float32 for what follows."""
    own = model.provenance.data_type
    return {"forward": own, "backward": own, "factors": "float32", "projection": "float32"}


def _verified(
    model: ResidentModel,
    objective: Objective,
    key: MatrixKey,
    passed: BackwardPass,
    changes: Interventions | None,
    check_cancelled: CancelCheck,
) -> Guarantee:
    """Compare the sum of the factors with the dense gradient, computed for this purpose."""
    ids = [token.id for token in objective.tokens]
    dense = dense_gradient(model, ids, objective.loss, key, check_cancelled, changes)
    factors = passed.factors[key]
    error = reconstruction_error(factors.inputs, factors.vjps, dense)
    return Guarantee("factors = dense gradient", error, TOLERANCES[model.provenance.data_type])

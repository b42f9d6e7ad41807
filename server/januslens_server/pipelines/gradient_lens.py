"""GradientLens: every weight's gradient as factors, read in the vocabulary (Katz et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from januslens_server.capture.hooks import Checkpoint
from januslens_server.errors import InvalidRequest
from januslens_server.lens import factors as factorised
from januslens_server.lens.projection import project
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import BackwardPass, Factors, MatrixKey, backward
from januslens_server.pipelines.clock import StageClock
from januslens_server.pipelines.inputs import read_layers
from januslens_server.pipelines.losses import Objective, read_objective
from januslens_server.results import (
    Components,
    End,
    Entries,
    GradientEvent,
    GradientHeader,
    GradientMatrix,
    GradientSummary,
    MatrixKind,
    Side,
)
from januslens_server.specs import GradientLensSpec, LensSpec

# How many entries of a factor outside the residual basis are reported.
ENTRIES = 10

# Factors that live in the residual basis: what these maps write; of all others, what they read.
WRITES_RESIDUAL = frozenset({MatrixKind.O, MatrixKind.FF2})


@dataclass(frozen=True)
class MatrixChoice:
    """The asked-for kinds that this model has, and those it has not."""

    kinds: tuple[MatrixKind, ...]
    skipped: tuple[MatrixKind, ...]


def gradient_lens(
    model: ResidentModel, spec: GradientLensSpec, checkpoint: Checkpoint
) -> Iterator[GradientEvent]:
    """Yield the header, then the matrices from the last layer down, then the summary.

    Raises `InvalidRequest` for inputs that this model cannot take, before anything is computed,
    and whatever `checkpoint` raises: before every block forward, at every matrix backward, and
    before every matrix's projection.
    """
    clock = StageClock()
    with clock.stage("tokenize"):
        objective = read_objective(model, spec)
        layers = read_layers(model, spec.layers)
        choice = choose_matrices(model, spec.matrices)
    keys = [(layer, kind) for layer in reversed(layers) for kind in choice.kinds]
    with clock.stage("backward"):
        ids = [token.id for token in objective.tokens]
        passed = backward(model, ids, objective.loss, keys, checkpoint)
        predicted = _predicted(model, passed, objective)
    yield GradientHeader(
        provenance=model.provenance,
        prompt_tokens=objective.tokens,
        loss=passed.loss,
        target_token_ids=objective.targets,
        predicted_token_id=predicted,
        skipped=choice.skipped,
    )
    for key in keys:
        checkpoint()
        with clock.stage("project"):
            matrix = _matrix(model, spec, key, passed.factors[key], objective.targets, predicted)
        yield matrix
    yield GradientSummary(matrices=len(keys), times=clock.times())


def choose_matrices(model: ResidentModel, asked: Sequence[MatrixKind]) -> MatrixChoice:
    """Resolve kinds against the model: FF1 stands for GATE and UP where the MLP is gated.

    Raises `InvalidRequest` if none of the asked-for kinds exists.
    """
    present = model.view.blocks[0].matrices
    wanted: list[MatrixKind] = []
    for kind in asked or (MatrixKind.FF1, MatrixKind.FF2):
        gated = kind is MatrixKind.FF1 and kind not in present
        wanted += (MatrixKind.GATE, MatrixKind.UP) if gated else (kind,)
    unique = tuple(dict.fromkeys(wanted))
    kinds = tuple(kind for kind in unique if kind in present)
    if not kinds:
        names = ", ".join(kind.name for kind in present)
        raise InvalidRequest("matrices", f"expected some of {names} for {model.name}")
    return MatrixChoice(kinds, tuple(kind for kind in unique if kind not in present))


@torch.inference_mode()
def _predicted(model: ResidentModel, passed: BackwardPass, objective: Objective) -> int:
    """The model's own answer to the prompt."""
    last = passed.residual[objective.prompt_length - 1][None]
    return int(project(model.view.lens, last, LensSpec(top_k=1, bottom_k=0)).top_ids[0, 0])


@torch.inference_mode()
def _matrix(
    model: ResidentModel,
    spec: GradientLensSpec,
    key: MatrixKey,
    factors: Factors,
    targets: Sequence[int],
    predicted: int,
) -> GradientMatrix:
    layer, kind = key
    side = Side.VJP if kind in WRITES_RESIDUAL else Side.INPUT
    inputs, vjps = factors.inputs.float(), factors.vjps.float()
    return GradientMatrix(
        layer=layer,
        kind=kind,
        d_in=inputs.shape[1],
        d_out=vjps.shape[1],
        projected_side=side,
        promoted_end=End.BOTTOM if side is Side.VJP else End.UNSPECIFIED,
        components=_components(model, spec, inputs, vjps, side, [*targets, predicted]),
        frobenius_norm=factorised.frobenius_norm(inputs, vjps),
    )


def _components(
    model: ResidentModel,
    spec: GradientLensSpec,
    inputs: torch.Tensor,
    vjps: torch.Tensor,
    side: Side,
    ranked: Sequence[int],
) -> Components:
    """The largest components; `ranked` are the targets and, last, the model's own answer."""
    positions = factorised.largest_first(inputs, vjps, spec.components)
    x, delta = inputs[positions], vjps[positions]
    residual, other = (x, delta) if side is Side.INPUT else (delta, x)
    tokens = torch.tensor(ranked, device=x.device).expand(len(positions), -1)
    table = project(model.view.lens, residual, spec.lens, tokens)
    indices, values = factorised.largest_entries(other, ENTRIES)
    return Components(
        positions=positions.cpu().numpy(),
        input_norms=x.norm(dim=-1).cpu().numpy(),
        vjp_norms=delta.norm(dim=-1).cpu().numpy(),
        projections=table,
        predicted_ranks=table.target_ranks[:, -1],
        target_ranks=table.target_ranks[:, :-1],
        other_side=Entries(indices.cpu().numpy(), values.cpu().numpy()),
        inputs=x.cpu().numpy() if spec.include_factors else None,
        vjps=delta.cpu().numpy() if spec.include_factors else None,
    )

"""Resolve which matrices the edits of a PreviewEdit change, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from januslens_server.errors import InvalidRequest
from januslens_server.models.matrices import Linear
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.inputs import (
    Part,
    choose_matrices,
    layer_matrices,
    layers_with_parts,
    read_layers,
)
from januslens_server.results import MatrixKind
from januslens_server.specs import DescentStep, ForwardShift, PreviewEditSpec

# Maximum effects of a grid on all prompts, because one message has them all.
MAX_EFFECTS = 4096


@dataclass(frozen=True)
class ResolvedEdit:
    """The matrices that one edit changes, and its strength: the learning rate, or eta.

    `layer` is that of an edit of a grid.
    """

    matrices: list[tuple[int, MatrixKind]]
    strength: float
    layer: int | None = None


def read_edits(model: ResidentModel, spec: PreviewEditSpec) -> list[ResolvedEdit]:
    """Return the single edit, or those of the grid by layer and strength.

    Raises `InvalidRequest` for an invalid layer or matrix.
    """
    edit, grid = spec.edit, spec.grid
    if grid is not None:
        changed = _of_grid(model, edit, grid.layers)
        effects = len(changed) * len(grid.strengths) * (1 + len(spec.probes))
        if effects > MAX_EFFECTS:
            raise InvalidRequest(
                "grid",
                f"too many effects: expected at most {MAX_EFFECTS} layers times strengths times "
                f"prompts, got {effects}",
            )
        return [
            ResolvedEdit(matrices, strength, layer)
            for layer, matrices in changed.items()
            for strength in grid.strengths
        ]
    if isinstance(edit, ForwardShift):
        (layer,) = read_layers(model, (edit.layer,), "shift.layer")
        single_ff2(model, layer)
        return [ResolvedEdit([(layer, MatrixKind.FF2)], edit.eta)]
    layers = read_layers(model, edit.layers, "descent.layers")
    kinds = choose_matrices(model, edit.matrices, "descent.matrices").kinds
    changed_by_step = layer_matrices(model, layers, kinds, "descent.layers")
    return [ResolvedEdit(changed_by_step, edit.learning_rate)]


def _of_grid(
    model: ResidentModel, edit: DescentStep | ForwardShift, asked: Sequence[int]
) -> dict[int, list[tuple[int, MatrixKind]]]:
    """Return the matrices that the edit changes in each layer of a grid."""
    field = "grid.layers"
    part = Part.MLP if isinstance(edit, ForwardShift) else None
    layers = layers_with_parts(model, asked, field, part)
    if isinstance(edit, ForwardShift):
        for layer in layers:
            single_ff2(model, layer, field)
        return {layer: [(layer, MatrixKind.FF2)] for layer in layers}
    kinds = choose_matrices(model, edit.matrices, "descent.matrices").kinds
    if not asked:  # only the layers that have at least one of the matrices
        layers = tuple({layer for layer, _ in layer_matrices(model, layers, kinds, field)})
    return {layer: layer_matrices(model, (layer,), kinds, field) for layer in sorted(layers)}


def single_ff2(model: ResidentModel, layer: int, field: str = "shift.layer") -> Linear:
    """Return the FF2 matrix that a shift edits.

    Raises `InvalidRequest` if the layer has experts.
    """
    layers_with_parts(model, (layer,), field, Part.MLP)
    linear = model.view.parts(layer).matrices[MatrixKind.FF2]
    if not isinstance(linear, Linear):
        raise InvalidRequest(
            field, f"layer {layer} has experts; expected a layer with a single FF2 matrix"
        )
    return linear

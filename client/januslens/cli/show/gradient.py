"""A whole gradient: what a step imprints, where it shifts the model, and what was asked beside."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from januslens._results.gradient import Gradient
from januslens._results.kinds import MatrixKind, Side
from januslens._results.matrices import Matrix
from januslens.cli.show.components import components_section
from januslens.cli.show.factor_grid import factor_picture
from januslens.cli.show.gradient_extras import (
    neuron_changes,
    segments_section,
    spectrum_section,
    verification_line,
)
from januslens.cli.show.heading import heading

_STEP = (
    "of gradient descent: each matrix W, y = x W, changes by -lr Σ xᵀδ over the positions; it "
    "imprints the inputs x and shifts the outputs against their VJPs δ"
)


def show_gradient(gradient: Gradient, console: Console, rows: int) -> None:
    """Print a gradient: the paper's pictures of both sides, then the tables asked for."""
    lines = heading(gradient.prompt_tokens, gradient.provenance)
    lines.add_row("loss", _loss(gradient))
    lines.add_row("step", Text(_STEP, "dim"))
    console.print(lines)
    for kind in _kinds(gradient):
        matrices = gradient.of_kind(kind)
        console.print(factor_picture(gradient, matrices, console.width))
        console.print(components_section(gradient, matrices, rows))
        _show_extras(matrices, console, gradient)
    if gradient.segments:
        console.print(segments_section(gradient))
    if skipped := gradient.header.skipped:
        console.print(Text(f"not in this architecture: {', '.join(skipped)}", style="dim"))


def _kinds(gradient: Gradient) -> list[MatrixKind]:
    """Inputs before VJPs: what is imprinted, then where it shifts."""
    sides = {matrix.kind: matrix.projected_side for matrix in gradient.matrices}
    return sorted(sides, key=lambda kind: (sides[kind] is Side.VJP, list(MatrixKind).index(kind)))


def _show_extras(matrices: Sequence[Matrix], console: Console, gradient: Gradient) -> None:
    if any(matrix.neurons for matrix in matrices):
        console.print(neuron_changes(matrices, gradient.header.targets))
    if any(matrix.spectrum for matrix in matrices):
        console.print(spectrum_section(matrices, gradient.header.targets))
    if any(matrix.verification for matrix in matrices):
        console.print(verification_line(matrices))


def _loss(gradient: Gradient) -> Text:
    line = Text()
    line.append(f"{gradient.loss:.4g} nats", "bold")
    targets = gradient.header.targets
    if targets:
        line.append(", target ")
        line.append("".join(str(token) for token in targets), "bold green")
        line.append(f", probability {math.exp(-gradient.loss):.2g}")
    line.append(f"; the model predicts {gradient.header.predicted}")
    return line

"""The largest components of a kind of matrix, over all layers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from januslens._results.components import Component
from januslens._results.gradient import Gradient
from januslens._results.kinds import Side
from januslens._results.matrices import Matrix
from januslens._results.tokens import Token
from januslens._results.words import at
from januslens.cli.show.cells import size_cell, tokens_cell
from januslens.cli.show.console import section, table

_SHOWN = 4


def components_section(gradient: Gradient, matrices: Sequence[Matrix], rows: int) -> Group:
    """One row a component, largest first: where it is, how large, and what it says."""
    kind, side = matrices[0].kind, matrices[0].projected_side
    readings = ["imprints"] if side is Side.INPUT else ["promotes", "suppresses"]
    grid = table(">layer", "position", ">|x|", ">|δ|", ">size", *readings, ">target's rank")
    for matrix, component in _largest(matrices, rows):
        grid.add_row(
            str(matrix.layer),
            Text(at(component.position, gradient.prompt_tokens), no_wrap=True),
            size_cell(component.input_norm),
            size_cell(component.vjp_norm),
            size_cell(component.size),
            *_readings(component, side, gradient.header.targets),
            Text(" ".join(str(rank) for rank in component.target_ranks)),
        )
    return section(f"The largest components of {kind}'s gradient", grid, _note(matrices[0]))


def _note(matrix: Matrix) -> str:
    if matrix.projected_side is Side.INPUT:
        return "size = |x||δ|, the component's Frobenius norm; rank in x, 0 being the top"
    end = matrix.promoted_end.lower()
    return (
        f"size = |x||δ|; rank in δ, 0 being the top: descent subtracts δ, so it promotes the {end}"
    )


def _largest(matrices: Sequence[Matrix], rows: int) -> list[tuple[Matrix, Component]]:
    pairs = [(matrix, part) for matrix in matrices for part in matrix.components if part.size > 0]
    return sorted(pairs, key=lambda pair: -pair[1].size)[:rows]


def _readings(component: Component, side: Side, sought: Sequence[Token]) -> list[Text]:
    if side is Side.INPUT:
        read = component.projection
        return [tokens_cell(read.top_tokens[:_SHOWN] if read else (), sought)]
    return [
        tokens_cell(component.promoted[:_SHOWN], sought),
        tokens_cell(component.suppressed[:_SHOWN], sought),
    ]

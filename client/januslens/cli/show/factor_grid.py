"""The paper's pictures: each layer's and position's factor, read in the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from januslens._results.components import Component
from januslens._results.gradient import Gradient
from januslens._results.kinds import End, MatrixKind, Side
from januslens._results.matrices import Matrix
from januslens._results.tokens import Token
from januslens.cli.show.cells import level_cell, token_cell
from januslens.cli.show.grid import position_grids

_ENDS = {End.TOP: "top", End.BOTTOM: "bottom"}


def factor_picture(gradient: Gradient, matrices: Sequence[Matrix], width: int) -> Group:
    """Layers upward, positions across: what is imprinted, or which way the model shifts."""
    title, note = _headings(matrices[0])
    largest = max((_strength(m, c) for m in matrices for c in m.components), default=0.0)
    cells = {
        (matrix.layer, component.position): _cell(
            matrix, component, gradient.header.targets, largest
        )
        for matrix in matrices
        for component in reversed(matrix.components)  # experts: the largest one is shown
    }
    grids: list[RenderableType] = []
    for grid in position_grids(gradient.prompt_tokens, cells, width):
        grids += [grid, Text("")]
    return Group(Text(f"\n{title}", "bold"), *grids[:-1], Text(note, "dim"))


def _headings(matrix: Matrix) -> tuple[str, str]:
    if matrix.projected_side is Side.INPUT:
        return (
            f"Imprint: what a step writes into {_rows(matrix.kind)}",
            "each cell: the top token of the input x there, and the component's size |x||δ|",
        )
    end = _ENDS.get(matrix.promoted_end, "")
    note = (
        f"each cell: ↑ promoted by a descent step, the {end} of δ's ranking; ↓ suppressed, its "
        "other end; and |δ|"
    )
    return f"Shift: which way a step moves what {matrix.kind} writes", note


def _strength(matrix: Matrix, component: Component) -> float:
    return component.size if matrix.projected_side is Side.INPUT else component.vjp_norm


def _rows(kind: MatrixKind) -> str:
    return f"{kind}'s columns" if kind in (MatrixKind.FF1, MatrixKind.GATE) else str(kind)


def _cell(matrix: Matrix, component: Component, sought: Sequence[Token], largest: float) -> Text:
    read = component.projection
    if component.size == 0 or read is None:
        return Text("·", "dim")  # no gradient arrives there
    if matrix.projected_side is Side.INPUT:
        lines = [_marked("", read.top_tokens[:1], sought)]
    else:
        lines = [
            _marked("↑", component.promoted[:1], sought),
            _marked("↓", component.suppressed[:1], sought),
        ]
    lines.append(level_cell(_strength(matrix, component), largest))
    lines[-1].stylize("dim")
    return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)


def _marked(mark: str, tokens: Sequence[Token], sought: Sequence[Token]) -> Text:
    if not tokens:
        return Text("")
    found = any(tokens[0].id == token.id for token in sought)
    return Text(mark, "dim").append_text(token_cell(tokens[0], "bold green" if found else ""))

"""A gradient, or one matrix of it, in a notebook: the paper's pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from januslens._notebook import cells
from januslens._notebook.elements import Child, document, element, note, table
from januslens._notebook.heading import cut, heading
from januslens._results.kinds import MatrixKind, Side
from januslens._results.words import at

if TYPE_CHECKING:
    from januslens._results.components import Component
    from januslens._results.gradient import Gradient
    from januslens._results.matrices import Matrix
    from januslens._results.tokens import Token

_TOKENS = 3
_ROWS = 8
_POSITIONS = 12


def gradient_html(gradient: Gradient) -> str:
    """What a step imprints and which way it shifts, layer by layer and position by position."""
    header = gradient.header
    kinds = dict.fromkeys(matrix.kind for matrix in gradient.matrices)
    order = list(MatrixKind)
    pictures = [_picture(gradient, kind) for kind in sorted(kinds, key=order.index)]
    return document(
        heading("Gradient", gradient.prompt_tokens, gradient.provenance),
        element(
            "p",
            f"loss {gradient.loss:.4g} for ",
            cells.tokens(header.targets, header.targets),
            "; the model predicts ",
            cells.tokens([header.predicted]),
        ),
        *pictures,
        *cut(gradient.summary is not None),
        note("show() opens the interactive page; to_pandas() is a frame of the components"),
    )


def matrix_html(matrix: Matrix) -> str:
    """One matrix: its largest components."""
    imprint = matrix.projected_side is Side.INPUT
    readings = ("imprints",) if imprint else ("promotes", "suppresses")
    rows = (_row(component, imprint) for component in matrix.components[:_ROWS])
    shown = min(len(matrix.components), _ROWS)
    return document(
        table(
            f"{matrix.name} [{matrix.d_in}, {matrix.d_out}]: norm "
            f"{cells.size(matrix.frobenius_norm)}, {shown} of {matrix.component_count} components",
            (">position", ">|x|", ">|δ|", ">size", *readings),
            rows,
        )
    )


def _row(component: Component, imprint: bool) -> Iterator[Child]:
    yield str(component.position)
    for norm in (component.input_norm, component.vjp_norm, component.size):
        yield cells.size(norm)
    for found in _readings(component, imprint):
        yield cells.tokens(found[:_TOKENS])


def _readings(component: Component, imprint: bool) -> list[tuple[Token, ...]]:
    if imprint:
        return [component.projection.top_tokens if component.projection else ()]
    return [component.promoted, component.suppressed]


def _picture(gradient: Gradient, kind: MatrixKind) -> Element:
    matrices = gradient.of_kind(kind)
    imprint = matrices[0].projected_side is Side.INPUT
    positions = list(range(len(gradient.prompt_tokens)))[-_POSITIONS:]
    # Of several experts' components at one position the largest stands for all.
    found = {
        (matrix.layer, part.position): part
        for matrix in matrices
        for part in sorted(matrix.components, key=lambda part: part.size)
    }
    largest = max((part.vjp_norm for part in found.values()), default=0.0)
    layers = sorted({matrix.layer for matrix in matrices}, reverse=True)
    made = table(
        f"{kind}: " + ("what a step imprints" if imprint else "which way a step shifts"),
        [">layer", *(at(position, gradient.prompt_tokens) for position in positions)],
        (
            [
                str(layer),
                *(_cell(found.get((layer, position)), imprint, largest) for position in positions),
            ]
            for layer in layers
        ),
    )
    made.set("class", "m")
    says = "x's top token" if imprint else "δ's ▲ top and ▼ bottom token; a descent step promotes"
    says += "" if imprint else " the underlined one"
    scale = f"colour: |δ|, square-root scale, 0 to {cells.size(largest)}"
    return element("div", made, note(f"{says}; {scale}"))


def _cell(component: Component | None, imprint: bool, largest: float) -> Element:
    if component is None or component.size == 0:
        return element("td", "·", classes="h d")
    lines: list[Child] = [cells.tokens(_ends(component)[0][:1])] if imprint else _marked(component)
    return cells.norm_cell(lines, component.vjp_norm, largest)


def _marked(component: Component) -> list[Child]:
    """Both ends as on the gradient's page, the one that a descent step promotes emphasised."""
    return [
        element("span", mark, cells.tokens(end[:1], component.promoted[:1]))
        for mark, end in zip(("▲ ", "▼ "), _ends(component), strict=True)
    ]


def _ends(component: Component) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
    projection = component.projection
    return (projection.top_tokens, projection.bottom_tokens) if projection else ((), ())

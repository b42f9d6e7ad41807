"""What a gradient shows on request: neurons, spectrum, segments, verification."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from januslens._results.gradient import Gradient
from januslens._results.matrices import Matrix
from januslens._results.projection import Projection
from januslens._results.tokens import Token
from januslens.cli.show.cells import percent_cell, size_cell, tokens_cell
from januslens.cli.show.console import section, table

_SHOWN = 3


def neuron_changes(matrices: Sequence[Matrix], sought: Sequence[Token]) -> Group:
    """The neurons that a step moves most: before, the change, after."""
    grid = table("neuron", ">|change|", "before", "the change", "after")
    for matrix in matrices:
        for neuron in matrix.neurons:
            grid.add_row(
                Text(f"L{matrix.layer} neuron {neuron.neuron}"),
                size_cell(neuron.change_norm),
                _top(neuron.before, sought),
                _top(neuron.change, sought),
                _top(neuron.after, sought),
            )
    return section(f"The neurons of {matrices[0].kind} that a step moves most", grid)


def spectrum_section(matrices: Sequence[Matrix], sought: Sequence[Token]) -> Group:
    """Singular values with what both ends of their directions say."""
    grid = table(">layer", ">singular value", ">explained", "one end", "the other")
    for matrix in matrices:
        for singular in matrix.spectrum:
            read = singular.projection
            grid.add_row(
                str(matrix.layer),
                size_cell(singular.value),
                percent_cell(singular.explained),
                tokens_cell(read.top_tokens[:_SHOWN] if read else (), sought),
                tokens_cell(read.bottom_tokens[:_SHOWN] if read else (), sought),
            )
    note = "explained: of the squared Frobenius norm; a direction's sign is arbitrary"
    return section(f"Spectrum of {matrices[0].kind}'s gradient", grid, note)


def segments_section(gradient: Gradient) -> Group:
    """The paper's figures as a table: norm and rank by segment of the prompt and by layer."""
    rows: dict[tuple[str, int], dict[str, Text]] = {}
    for row in gradient.segments:
        cell = Text.assemble(size_cell(row.mean_vjp_norm), (f"  {row.mean_target_rank:.0f}", "dim"))
        unread = row.mean_vjp_norm == 0
        rows.setdefault((str(row.kind), row.layer), {})[row.segment] = (
            Text("·", "dim") if unread else cell
        )
    segments = list(dict.fromkeys(row.segment for row in gradient.segments))
    grid = table("matrix", ">layer", *(f">{segment.replace('_', ' ')}" for segment in segments))
    for (kind, layer), cells in sorted(rows.items(), key=lambda item: (item[0][0], -item[0][1])):
        grid.add_row(kind, str(layer), *(cells.get(segment, Text("")) for segment in segments))
    note = "each cell: |δ| and the target's rank in the projected factor, means over the segment"
    return section("By segment of the prompt", grid, note)


def verification_line(matrices: Sequence[Matrix]) -> Text:
    """The largest error of the factorisation against autograd's dense gradient."""
    checks = [matrix.verification for matrix in matrices if matrix.verification]
    worst = max(checks, key=lambda check: check.relative_error)
    held = worst.relative_error <= worst.tolerance
    return Text(
        f"{matrices[0].kind} against autograd: relative error at most {worst.relative_error:.1e} "
        f"(tolerance {worst.tolerance:.0e}, {'held' if held else 'NOT held'})",
        "" if held else "bold red",
    )


def _top(read: Projection | None, sought: Sequence[Token]) -> Text:
    return tokens_cell(read.top_tokens[:_SHOWN] if read else (), sought)

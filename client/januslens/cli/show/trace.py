"""A whole trace: how the target emerges, which components brought it, and by which way."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from januslens._results.graph import Part
from januslens._results.kinds import NodeKind
from januslens._results.tokens import Token
from januslens._results.trace import Trace
from januslens._results.trace_events import PositionTarget
from januslens.cli.show.cells import token_cell
from januslens.cli.show.emergence import emergence
from januslens.cli.show.grid import position_grids
from januslens.cli.show.heading import heading
from januslens.cli.show.heads import heads_section
from januslens.cli.show.neurons import neurons_section
from januslens.cli.show.path import path_section
from januslens.cli.show.story import story

_IN_FULL = 3


def show_trace(trace: Trace, console: Console, rows: int, details: bool) -> None:
    """Print a trace; of many positions a picture first, then the last ones in full."""
    console.print(heading(trace.prompt_tokens, trace.provenance))
    if len(trace.targets) > 1:
        _show_picture(trace, console)
    for target in trace.targets[-_IN_FULL:]:
        _show_position(trace, target, console, rows, details)


def _show_picture(trace: Trace, console: Console) -> None:
    console.print(Text("\nThe residual stream after each layer", "bold"))
    for grid in position_grids(trace.prompt_tokens, _top_tokens(trace), console.width):
        console.print(grid, "")
    note = "each cell: the top token, green where it is the target of its position"
    console.print(Text(note, "dim"))


def _top_tokens(trace: Trace) -> dict[tuple[int, int], Text]:
    cells = {}
    for node in trace.nodes_of(NodeKind.BLOCK_OUTPUT):
        if node.projection and node.projection.top and None not in (node.layer, node.position):
            style = "bold green" if node.projection.target_rank == 0 else ""
            cell = token_cell(node.projection.top[0].token, style)
            cells[node.layer or 0, node.position or 0] = cell
    return cells


def _show_position(
    trace: Trace, target: PositionTarget, console: Console, rows: int, details: bool
) -> None:
    console.print("", story(trace, target), sep="\n")
    console.print(emergence(trace, target.position))
    sought = [target.target]
    if details:
        _show_layers(trace, target, console, rows)
    else:
        brought = f"that brought {target.target}, strongest first"
        heads = _strongest(trace.heads(target.position))[:rows]
        console.print(heads_section(trace, heads, f"The heads {brought}", sought))
        neurons = _strongest(trace.neurons(target.position))[:rows]
        console.print(neurons_section(neurons, f"The neurons {brought}", sought))
    path = trace.path_to_target(target.position)
    console.print(path_section(trace, path if details else _to_first_source(path), sought))


def _show_layers(trace: Trace, target: PositionTarget, console: Console, rows: int) -> None:
    """Every layer in turn, as the paper's figure shows it."""
    sought: Sequence[Token] = [target.target]
    for layer in trace.layers:
        heads, neurons = layer.heads(target.position), layer.neurons(target.position)
        title = f"Layer {layer.layer}: what attention brings"
        console.print(heads_section(trace, heads[:rows], title, sought))
        title = f"Layer {layer.layer}: what the MLP recalls"
        console.print(neurons_section(neurons[:rows], title, sought))


def _to_first_source(path: Sequence[Part]) -> Sequence[Part]:
    """The path as far as the first token that a head took something from."""
    for i, part in enumerate(path):
        if part.node.kind is NodeKind.MEMORY_VALUE:
            return path[: i + 1]
    return path


def _strongest(parts: Sequence[Part]) -> list[Part]:
    """By what each adds to the target's logit; without that, by share."""
    return sorted(parts, key=_strength, reverse=True)


def _strength(part: Part) -> float:
    if part.logit_contribution is not None:
        return part.logit_contribution
    return part.share or 0.0

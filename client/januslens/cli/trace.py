"""The command `januslens trace`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from januslens import _presentation as presentation
from januslens import arguments
from januslens.assemblers import TraceEvent
from januslens.cli.options import (
    COUNT,
    estimate_option,
    export_option,
    layer_list,
    lens_option,
    model_option,
    not_both,
    out_option,
    page_option,
    position_list,
    prompt_argument,
    rows_option,
    save_result,
    show_estimate,
    source_list,
    unit_list,
    usage_errors,
    with_client,
    write_page,
)
from januslens.cli.tables import (
    COLUMNS_PER_ROW,
    Steps,
    console,
    heading,
    labelled,
    left_out,
    percent_cell,
    position_grids,
    probability_cell,
    rank_cell,
    section,
    sentence,
    signed_cell,
    steps,
    table,
    token_cell,
    tokens_cell,
)
from januslens.client import Client, EventStream
from januslens.results.contributions import ContributionTree
from januslens.results.graph import GraphView, Node, Part
from januslens.results.graph_files import GRAPH_FORMATS, GraphFormat, graph_format
from januslens.results.kinds import NodeKind
from januslens.results.tokens import Token
from januslens.results.trace import LayerGraph, PositionTarget, Trace, TraceHeader


@click.command()
@click.option(
    "--target",
    help="Target token, for example ' Paris' with its space; default: the model's own next token.",
)
@click.option("--other", help="Token whose logit is subtracted from that of the target.")
@click.option("--layers", callback=layer_list, help="Layers, for example 0-3,7; default: all.")
@click.option(
    "--positions",
    callback=position_list,
    help="Positions, for example -1,3, or all; default: the last.",
)
@model_option
@rows_option
@click.option("--details", is_flag=True, help="Also print the heads and neurons of each layer.")
@click.option("--heads", type=COUNT, help="Heads per layer; 0 = all; default: 10.")
@click.option("--memory-values", type=COUNT, help="Source positions per head; 0 = all; default: 2.")
@click.option(
    "--top-neurons",
    type=COUNT,
    help="Neurons per layer with the largest score; 0 = all; default: 18.",
)
@click.option(
    "--bottom-neurons", type=COUNT, help="Neurons per layer with the smallest score; default: 7."
)
@click.option(
    "--only-heads",
    callback=unit_list,
    metavar="LAYER.HEAD,...",
    help="Heads to show instead, for example 9.6,9.9.",
)
@click.option(
    "--only-neurons",
    callback=unit_list,
    metavar="LAYER.NEURON,...",
    help="Neurons to show instead.",
)
@click.option(
    "--only-sources",
    callback=source_list,
    metavar="LAYER.HEAD.POSITION,...",
    help="Source positions of heads to show instead, for example 9.6.2.",
)
@click.option(
    "--next-tokens",
    is_flag=True,
    help="Take the next token of PROMPT as the target of each position.",
)
@click.option(
    "--select-by",
    type=click.Choice(["visit", "contribution", "attribution"]),
    default="contribution",
    show_default=True,
    help="Score by which heads, sources and neurons are selected.",
)
@click.option("--top-k", type=COUNT, help="Most likely tokens per vector; default: 5.")
@click.option("--bottom-k", type=COUNT, help="Least likely tokens per vector; default: 5.")
@lens_option
@page_option
@out_option
@export_option
@click.option(
    "--export-format",
    type=click.Choice(GRAPH_FORMATS),
    help="Format of the file of --export; circuit-tracer files are also for Neuronpedia.",
)
@estimate_option
@with_client
@prompt_argument
def trace(  # noqa: PLR0913 - by keyword
    client: Client,
    as_json: bool,
    /,
    *,
    prompt: arguments.Prompt,
    rows: int,
    details: bool,
    html: Path | None,
    out: Path | None,
    export: Path | None,
    export_format: GraphFormat | None,
    estimate: bool,
    **asked: Any,
) -> None:
    """Show how the model computes its next token after PROMPT.

    Print how the target's rank changes along the residual stream, and which heads and neurons
    contribute most to its logit, as a summary of the VISIT flow graph.
    """
    not_both(as_json, html)
    if estimate:
        show_estimate(client.estimate_trace, as_json, prompt, asked)
        return
    with usage_errors():  # the other options have the names of the method's arguments
        if export:
            export_format = graph_format(export, export_format)
        stream = client.stream_trace(prompt, **asked)
    with stream, steps("tracing") as progress:
        result = _followed(stream, progress)
    if not as_json:
        show_trace(result, console(), rows, details)
    save_result(out, result.save)
    with usage_errors():
        save_result(export, lambda file: result.export(file, export_format))
    if html:
        write_page(html, result.to_html(_overview(client, result, asked)))


def _overview(client: Client, result: Trace, asked: dict[str, Any]) -> Trace | None:
    """Request the overview of a trace; None if the trace has all positions."""
    if len(result.targets) == len(result.prompt_tokens):
        return None
    return client.trace_overview(result, lens=asked["lens"], top_k=asked["top_k"] or 3)


def _followed(stream: EventStream[TraceEvent, Trace], progress: Steps) -> Trace:
    for event in stream:
        if isinstance(event, TraceHeader):
            progress.of(len(event.layers))
        elif isinstance(event, LayerGraph):
            progress.done(f"layer {event.layer}")
    return stream.result()


def story(trace: Trace, target: PositionTarget) -> Table:
    """Sentences about the target, the layer from which it ranks first, and its strongest parts."""
    lines = labelled()
    label = "target"
    for parts in presentation.trace_sentences(trace, target):
        lines.add_row(label, sentence(parts, [target.target]))
        label = ""
    return lines


_BAR = 10
_BLOCKS = " ▏▎▍▌▋▊▉█"
_RESIDUAL_TOKENS = 3


def emergence(trace: Trace, position: int, rows: int) -> Group:
    """One row per residual: top tokens, the target's rank and probability, the added logit.

    Besides the first and the last, it has the `rows` steps that add most; the others are folded.
    """
    target = trace.target(position).target
    grid = table(">layer", "residual", "top tokens", ">rank", "probability", ">logit")
    steps = list(presentation.all_residual_steps(trace, position))
    lines = list(presentation.folded_steps(steps, rows))
    previous = ""
    for line in lines:
        if isinstance(line, presentation.FoldedSteps):
            added = Text("" if line.contribution is None else f"{line.contribution:+.2f}")
            cells = (line.layers, f"{len(line.steps)} steps", "", line.ranks, "", added)
            grid.add_row(*cells, style="dim italic")
            previous = ""
        else:
            label = str(line.layer)
            reading = _reading(line, [target])
            grid.add_row("" if label == previous else label, line.name, *reading)
            previous = label
    note = (
        f"rank 0 is the top; logit: what the step adds directly to the {trace.explained(position)}"
    )
    if len(lines) < len(steps):
        note += "; steps that add little are folded to their sum (see --rows)"
    return section(f"{target} in the residual stream, layer by layer", grid, note)


def _reading(step: presentation.ResidualStep, sought: Sequence[Token]) -> list[Text]:
    read = step.node.projection
    return [
        tokens_cell(read.top_tokens[:_RESIDUAL_TOKENS], sought) if read else Text(""),
        rank_cell(read.target_rank if read else None),
        _probability_bar(read.target_probability, read.target_log_probability)
        if read
        else Text(""),
        signed_cell(step.contribution),
    ]


def _probability_bar(probability: float | None, logarithm: float | None) -> Text:
    if probability is None:
        return Text("")
    eighths = round(probability * _BAR * 8)
    bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
    return Text.assemble(probability_cell(probability, logarithm), " ", (bar, "green"))


_SOURCES = 2
_HEAD_TOKENS = 4


def heads_section(
    trace: Trace, heads: Sequence[Part], title: str, sought: Sequence[Token]
) -> Group:
    """One row per head: contribution, share, sources with their attention, and top tokens."""
    grid = table(">logit", ">share", "head", "attends to", "writes")
    for part in heads:
        read = part.node.projection
        grid.add_row(
            signed_cell(part.logit_contribution),
            percent_cell(part.share),
            Text(_head_name(part.node)),
            _sources(trace, part),
            tokens_cell(read.top_tokens[:_HEAD_TOKENS], sought) if read else Text(""),
        )
    note = (
        "share: of the heads of the layer; attends to: source token (position) with its attention; "
        "writes: top tokens of the head's output"
    )
    return section(title, grid, note)


def _head_name(head: Node) -> str:
    of_mixer = " of the mixer" if head.kind is NodeKind.MIXER_HEAD else ""
    return f"L{head.layer} head {head.head}{of_mixer}"


def _sources(trace: Trace, head: Part) -> Text:
    """The sources of a head, largest attention first."""
    memories = [
        part for part in trace.parts_of(head.node) if part.node.kind is NodeKind.MEMORY_VALUE
    ]
    memories.sort(key=lambda part: -_attention(part))
    cell = Text(no_wrap=True, overflow="ellipsis")
    for part in memories[:_SOURCES]:
        cell.append(
            f"{presentation.token_at(part.node.source_position or 0, trace.prompt_tokens)} "
        )
        cell.append(f"{_attention(part):.2f}  ", "dim")
    cell.rstrip()
    return cell


def _attention(part: Part) -> float:
    return (part.edge.attention if part.edge else None) or 0.0


_NEURON_TOKENS = 5


def neurons_section(neurons: Sequence[Part], title: str, sought: Sequence[Token]) -> Group:
    """One row per neuron: contribution, share, activation, and the tokens of its row of FF2."""
    grid = table(">logit", ">share", "neuron", ">activation", "writes")
    for part in neurons:
        grid.add_row(
            signed_cell(part.logit_contribution),
            percent_cell(part.share),
            Text(_neuron_name(part.node)),
            signed_cell(part.node.activation),
            tokens_cell(presentation.written_tokens(part.node)[:_NEURON_TOKENS], sought),
        )
    note = (
        "share: of the MLP's output; writes: top tokens of the neuron's row of FF2, or its bottom "
        "tokens if the activation is negative"
    )
    return section(title, grid, note)


def _neuron_name(node: Node) -> str:
    expert = "" if node.expert is None else f" expert {node.expert}"
    return f"L{node.layer}{expert} neuron {node.neuron}"


_TREE_TOKENS = 3


def contribution_section(tree: ContributionTree, trace: Trace, sought: Sequence[Token]) -> Group:
    """One row per node of the tree: contribution, name, attention, and the tokens it writes."""
    grid = table(">logit", "node", ">attention", "writes")
    for line in presentation.contribution_lines(tree, trace):
        part = line.part
        attention = None if part is None else part.attention
        tokens = () if part is None else presentation.written_tokens(part.node)[:_TREE_TOKENS]
        grid.add_row(
            signed_cell(line.contribution),
            Text("  " * line.depth + line.name, "" if part else "dim"),
            Text("" if attention is None else f"{attention:.2f}"),
            tokens_cell(tokens, sought),
        )
    return section(
        f"Where the {presentation.figure_name(trace)} comes from",
        grid,
        "logit: direct contribution, the sum of the indented rows below; rest: parts not listed",
    )


_IN_FULL = 3


def show_trace(trace: Trace, console: Console, rows: int, details: bool) -> None:
    """Print a trace: for several positions a grid, then the last positions in full."""
    console.print(heading(trace.prompt_tokens, trace.provenance))
    for limit in presentation.level_sentences(trace.header.limited_layers):
        console.print(Text(limit, "dim"))
    if len(trace.targets) > 1:
        _show_picture(trace, console, rows)
    for target in trace.targets[-_IN_FULL:]:
        _show_position(trace, target, console, rows, details)


def _show_picture(trace: Trace, console: Console, rows: int) -> None:
    """Print the top tokens of `rows` layers at the last positions."""
    console.print(Text("\nResidual stream after each layer", "bold"))
    cells = _top_tokens(trace)
    layers = sorted({layer for layer, _ in cells}, reverse=True)
    shown = {layers[i * len(layers) // rows] for i in range(rows)} if layers else set()
    traced = [target.position for target in trace.targets]
    positions = traced[-COLUMNS_PER_ROW * rows :]
    found = {
        (layer, position): cell
        for (layer, position), cell in cells.items()
        if layer in shown and position in positions
    }
    for grid in position_grids(trace.prompt_tokens, found, console.width):
        console.print(grid, "")
    note = "each cell: the top token, green if it is the target of its position"
    note += left_out(len(shown), len(layers), "layers, at even distances")
    note += left_out(len(positions), len(traced), "positions, the last ones")
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
    console.print(emergence(trace, target.position, rows))
    sought = [target.target]
    if details:
        _show_layers(trace, target, console, rows)
    else:
        added = f"that add most to the {trace.explained(target.position)}"
        heads = _strongest(_heads(trace, target.position))[:rows]
        if heads:
            console.print(heads_section(trace, heads, f"Heads {added}", sought))
        neurons = _strongest(trace.parts_of_kind(NodeKind.MLP_VALUE, target.position))[:rows]
        if neurons:
            console.print(neurons_section(neurons, f"Neurons {added}", sought))
    _show_contributions(trace, target, console, 3 * rows if details else rows)


def _show_layers(trace: Trace, target: PositionTarget, console: Console, rows: int) -> None:
    """Print the heads and neurons of every layer that has them."""
    sought: Sequence[Token] = [target.target]
    for layer in trace.layers:
        heads = _heads(layer, target.position)
        neurons = layer.parts_of_kind(NodeKind.MLP_VALUE, target.position)
        of_mixer = any(part.node.kind is NodeKind.MIXER_HEAD for part in heads)
        title = f"Layer {layer.layer}: {'heads of the mixer' if of_mixer else 'attention heads'}"
        if heads:
            console.print(heads_section(trace, heads[:rows], title, sought))
        title = f"Layer {layer.layer}: MLP neurons"
        if neurons:
            console.print(neurons_section(neurons[:rows], title, sought))


def _heads(graph: GraphView, position: int) -> list[Part]:
    """The heads of attention, and those of linear attention and state spaces."""
    kinds = (NodeKind.HEAD_OUTPUT, NodeKind.MIXER_HEAD)
    return [part for kind in kinds for part in graph.parts_of_kind(kind, position)]


def _show_contributions(
    trace: Trace, target: PositionTarget, console: Console, at_most: int
) -> None:
    try:
        tree = trace.why(target.position, at_most=at_most)
    except ValueError:  # requested without contributions, or without the residual stream
        return
    console.print(contribution_section(tree, trace, [target.target]))


def _strongest(parts: Sequence[Part]) -> list[Part]:
    """Sort parts by contribution to the target's logit, or by share without contributions."""
    return sorted(parts, key=_strength, reverse=True)


def _strength(part: Part) -> float:
    if part.logit_contribution is not None:
        return part.logit_contribution
    return part.share or 0.0

"""The command `januslens gradient`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.text import Text

from januslens import _presentation as presentation
from januslens import arguments
from januslens.arguments import DescentStep, Edit, ForwardShift, Probe
from januslens.assemblers import GradientEvent
from januslens.cli.options import (
    COUNT,
    Number,
    estimate_option,
    layer_list,
    lens_option,
    matrix_list,
    model_option,
    module_list,
    not_both,
    out_option,
    page_option,
    prompt_argument,
    rows_option,
    save_result,
    show_estimate,
    usage_errors,
    with_client,
    write_page,
)
from januslens.cli.tables import (
    COLUMNS_PER_ROW,
    Steps,
    console,
    heading,
    left_out,
    level_cell,
    percent_cell,
    position_grids,
    probability_cell,
    rank_cell,
    section,
    sentence,
    size_cell,
    steps,
    table,
    token_cell,
    tokens_cell,
)
from januslens.client import Client, EventStream
from januslens.results.attention import AttentionGradient
from januslens.results.gradient import EditPreview, Effect, Gradient
from januslens.results.kinds import End, MatrixKind, Side
from januslens.results.matrices import Component, Matrix
from januslens.results.tokens import Token
from januslens.results.vectors import Projection


@click.command()
@click.option("--target", required=True, help="Target tokens, for example ' Paris' with its space.")
@click.option("--layers", callback=layer_list, help="Layers, for example 0-3,7; default: all.")
@click.option(
    "--matrices",
    callback=matrix_list,
    help="Matrices, for example q,k,v,o; default: ff1,ff2, or gate,up,ff2 in a gated MLP, or none "
    "with --modules.",
)
@click.option(
    "--modules",
    callback=module_list,
    help="Linear maps by the names of their modules, for example linear_attn.out_proj or "
    "'mamba.*'; `models --json` lists them.",
)
@model_option
@rows_option
@click.option(
    "--subject",
    metavar="TEXT",
    help="Subject, a part of PROMPT; adds a table of norms and ranks by segment.",
)
@click.option(
    "--neurons",
    type=COUNT,
    default=0,
    metavar="N",
    help="Also show the N neurons that the step changes most.",
)
@click.option(
    "--lr",
    "learning_rate",
    type=Number(),
    help="Learning rate of the step, for --neurons and --preview.",
)
@click.option(
    "--spectrum",
    type=COUNT,
    default=0,
    metavar="N",
    help="Also show the N largest singular values of each gradient.",
)
@click.option(
    "--components",
    type=COUNT,
    help="Outer products per matrix, largest first; 0 = all; default: 16.",
)
@click.option("--top-k", type=COUNT, help="Most likely tokens per vector; default: 5.")
@click.option("--bottom-k", type=COUNT, help="Least likely tokens per vector; default: 5.")
@lens_option
@click.option(
    "--preview",
    is_flag=True,
    help="Preview a descent step with the learning rate --lr on the chosen matrices and layers.",
)
@click.option(
    "--shift", type=COUNT, metavar="LAYER", help="Preview a forward-pass shift in this layer."
)
@click.option("--eta", type=Number(), default=0.24, show_default=True, help="Strength of --shift.")
@click.option(
    "--probe",
    "probes",
    multiple=True,
    metavar="PROMPT",
    help="Also report this prompt before and after the edit (repeatable).",
)
@click.option("--verify", is_flag=True, help="Compare each gradient with autograd's.")
@click.option(
    "--attention", is_flag=True, help="Also show where the gradients of attention are largest."
)
@page_option
@out_option
@estimate_option
@with_client
@prompt_argument
def gradient(  # noqa: PLR0913 - an option each
    client: Client,
    as_json: bool,
    /,
    *,
    prompt: arguments.Text | arguments.Chat,
    rows: int,
    preview: bool,
    shift: int | None,
    eta: float,
    probes: tuple[str, ...],
    html: Path | None,
    out: Path | None,
    estimate: bool,
    **asked: Any,
) -> None:
    """Show what a gradient step towards --target changes.

    Project the gradient of each weight matrix to the vocabulary, as the Backward Lens does. With
    --preview or --shift, also show the probabilities before and after the edit, for PROMPT and
    for every --probe. The model's weights are not changed.
    """
    not_both(as_json, html)
    if estimate:
        show_estimate(client.estimate_gradient_lens, as_json, prompt, asked)
        return
    edits = _edits(preview, shift, eta, asked)
    with usage_errors():  # the other options have the names of the method's arguments
        stream = client.stream_gradient_lens(prompt, **asked)
    with stream, steps("gradients") as progress:
        result = _followed(stream, progress)
    if not as_json:
        show_gradient(result, console(), rows)
    save_result(out, result.save)
    plain = arguments.Text("") if isinstance(prompt, arguments.Chat) else prompt
    watched = [Probe(replace(plain, text=probe), label=probe) for probe in probes]
    previews: dict[str, EditPreview] = {}
    for title, edit in edits.items():
        previews[title] = client.preview_edit(
            prompt, asked["target"], edit, probes=watched, model=asked["model"]
        )
        if not as_json:
            console().print(preview_section(previews[title], title))
    if html:
        write_page(html, result.to_html(previews))


def _edits(preview: bool, shift: int | None, eta: float, asked: dict[str, Any]) -> dict[str, Edit]:
    """Return the edits to preview, by title."""
    edits: dict[str, Edit] = {}
    if preview:
        rate = asked["learning_rate"]
        if not rate:
            context = click.get_current_context()
            raise click.UsageError("--preview needs --lr (the learning rate of the step)", context)
        title = f"Effect of a descent step with learning rate {rate:g}"
        edits[title] = DescentStep(rate, asked["matrices"], asked["layers"])
    if shift is not None:
        title = f"Effect of a forward shift of layer {shift} by {eta:g}"
        edits[title] = ForwardShift(shift, eta)
    return edits


def _followed(stream: EventStream[GradientEvent, Gradient], progress: Steps) -> Gradient:
    for event in stream:
        if isinstance(event, AttentionGradient):
            progress.done(f"attention of layer {event.layer}")
        elif isinstance(event, Matrix):
            progress.done(event.name)
    return stream.result()


_ENDS = {End.TOP: "top", End.BOTTOM: "bottom"}


def factor_picture(gradient: Gradient, matrices: Sequence[Matrix], rows: int, width: int) -> Group:
    """A grid of layers and positions: tokens that a descent step imprints, or shifts towards.

    It has the layers and the positions with the strongest components.
    """
    title, note = _headings(matrices[0])
    layers: dict[int, float] = {}
    positions: dict[int, float] = {}
    for matrix in matrices:
        layers.setdefault(matrix.layer, 0.0)
        for component in matrix.components:
            strength, position = _strength(matrix, component), component.position
            layers[matrix.layer] = max(layers[matrix.layer], strength)
            positions[position] = max(positions.get(position, 0.0), strength)
    shown = sorted(layers, key=layers.__getitem__, reverse=True)[:rows]
    columns = sorted(positions, key=positions.__getitem__, reverse=True)[: COLUMNS_PER_ROW * rows]
    largest = max(layers.values(), default=0.0)
    note += left_out(len(shown), len(layers), "layers with the largest components")
    note += left_out(len(columns), len(positions), "positions with the largest components")
    cells = {
        (matrix.layer, component.position): _cell(
            matrix, component, gradient.header.targets, largest
        )
        for matrix in matrices
        if matrix.layer in shown
        for component in reversed(matrix.components)  # the largest of several experts is set last
        if component.position in columns
    }
    grids: list[RenderableType] = []
    for grid in position_grids(gradient.prompt_tokens, cells, width):
        grids += [grid, Text("")]
    return Group(Text(f"\n{title}", "bold"), *grids[:-1], Text(note, "dim"))


def _headings(matrix: Matrix) -> tuple[str, str]:
    title = presentation.factor_title(matrix)
    if matrix.projected_side is Side.UNSPECIFIED:
        return title, "each cell: the component's size |x||δ|"
    if matrix.projected_side is Side.INPUT:
        note = (
            "each cell: the top token of x and the component's size |x||δ|; a descent step "
            f"imprints x in {_rows(matrix.kind)}"
        )
        return title, note
    end = _ENDS.get(matrix.promoted_end, "")
    note = (
        f"each cell: ↑ the token that a descent step promotes most (the {end} token of δ), ↓ the "
        "token that it suppresses most, and |δ|"
    )
    return title, note


def _strength(matrix: Matrix, component: Component) -> float:
    return component.vjp_norm if matrix.projected_side is Side.VJP else component.size


def _rows(kind: MatrixKind | str) -> str:
    return f"{kind}'s columns" if kind in (MatrixKind.FF1, MatrixKind.GATE) else str(kind)


def _cell(matrix: Matrix, component: Component, sought: Sequence[Token], largest: float) -> Text:
    read = component.projection
    if matrix.projected_side is Side.UNSPECIFIED:
        return level_cell(_strength(matrix, component), largest)
    if component.size == 0 or read is None:
        return Text("·", "dim")  # the VJP is zero
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


_COMPONENT_TOKENS = 4


def components_section(gradient: Gradient, matrices: Sequence[Matrix], rows: int) -> Group:
    """One row per component, largest first: its place, its size and its tokens."""
    kind, side = matrices[0].kind, matrices[0].projected_side
    readings = _READINGS[side]
    rank = ">promotion rank" if side is Side.VJP else ">target's rank"
    grid = table(">layer", "position", ">|x|", ">|δ|", ">size", *readings, rank)
    vocabulary = gradient.header.sizes.vocab_size
    for matrix, component in _largest(matrices, rows):
        grid.add_row(
            str(matrix.layer),
            Text(presentation.token_at(component.position, gradient.prompt_tokens), no_wrap=True),
            size_cell(component.input_norm),
            size_cell(component.vjp_norm),
            size_cell(component.size),
            *_readings(component, side, gradient.header.targets),
            _ranks(matrix.promoted_end, component.target_ranks, vocabulary),
        )
    return section(f"The largest components of {kind}'s gradient", grid, _note(matrices[0]))


_READINGS = {
    Side.INPUT: ["top tokens of x"],
    Side.VJP: ["promotes", "suppresses"],
    Side.UNSPECIFIED: [],
}


def _ranks(promoted: End, ranks: Sequence[float], vocabulary: int) -> Text:
    """Ranks in the projected factor, in δ from the promoted end."""
    counted = (presentation.promotion_rank(rank, promoted, vocabulary) for rank in ranks)
    return Text(" ".join(f"{rank:.0f}" for rank in counted))


def _note(matrix: Matrix) -> str:
    if matrix.projected_side is Side.UNSPECIFIED:
        return "size: |x||δ|, the component's Frobenius norm"
    if matrix.projected_side is Side.INPUT:
        return "size: |x||δ|, the component's Frobenius norm; rank: in x, 0 is the top"
    return "size: |x||δ|; promotion rank of the target: a descent step promotes rank 0 most"


def _largest(matrices: Sequence[Matrix], rows: int) -> list[tuple[Matrix, Component]]:
    pairs = [(matrix, part) for matrix in matrices for part in matrix.components if part.size > 0]
    return sorted(pairs, key=lambda pair: -pair[1].size)[:rows]


def _readings(component: Component, side: Side, sought: Sequence[Token]) -> list[Text]:
    if side is Side.UNSPECIFIED:
        return []
    if side is Side.INPUT:
        read = component.projection
        return [tokens_cell(read.top_tokens[:_COMPONENT_TOKENS] if read else (), sought)]
    return [
        tokens_cell(component.promoted[:_COMPONENT_TOKENS], sought),
        tokens_cell(component.suppressed[:_COMPONENT_TOKENS], sought),
    ]


_EXTRA_TOKENS = 3


def neuron_changes(matrices: Sequence[Matrix], sought: Sequence[Token], rows: int) -> Group:
    """The neurons that a step changes most: tokens before, of the change, and after."""
    grid = table("neuron", ">|change|", "before", "change", "after")
    found = [(matrix, neuron) for matrix in matrices for neuron in matrix.neurons]
    for matrix, neuron in sorted(found, key=lambda pair: -pair[1].change_norm)[:rows]:
        expert = "" if matrix.expert is None else f" expert {matrix.expert}"
        grid.add_row(
            Text(f"L{matrix.layer}{expert} neuron {neuron.neuron}"),
            size_cell(neuron.change_norm),
            _top(neuron.before, sought),
            _top(neuron.change, sought),
            _top(neuron.after, sought),
        )
    return section(f"The neurons of {matrices[0].kind} that a step changes most", grid)


def spectrum_section(matrices: Sequence[Matrix], sought: Sequence[Token], rows: int) -> Group:
    """The largest singular values, with the top and bottom tokens of their vectors."""
    grid = table(">layer", ">singular value", ">explained", "one end", "the other end")
    found = [(matrix, singular) for matrix in matrices for singular in matrix.spectrum]
    for matrix, singular in sorted(found, key=lambda pair: -pair[1].value)[:rows]:
        read = singular.projection
        grid.add_row(
            str(matrix.layer),
            size_cell(singular.value),
            percent_cell(singular.explained),
            tokens_cell(read.top_tokens[:_EXTRA_TOKENS] if read else (), sought),
            tokens_cell(read.bottom_tokens[:_EXTRA_TOKENS] if read else (), sought),
        )
    note = (
        "explained: share of the squared Frobenius norm; the sign of a singular vector is arbitrary"
    )
    return section(f"Spectrum of {matrices[0].kind}'s gradient", grid, note)


def segments_section(gradient: Gradient, limit: int) -> Group:
    """Norm and rank by segment and layer, as in figures 5 and 6 of Backward Lens.

    The table has the `limit` matrices with the largest mean norm in a segment.
    """
    largest: dict[tuple[str, int], float] = {}
    rows: dict[tuple[str, int], dict[str, Text]] = {}
    vocabulary = gradient.header.sizes.vocab_size
    ends = {(matrix.kind, matrix.layer): matrix.promoted_end for matrix in gradient.matrices}
    for row in gradient.segments:
        cell = size_cell(row.mean_vjp_norm)
        if row.mean_target_rank is not None:
            end = ends.get((row.kind, row.layer), End.UNSPECIFIED)
            rank = _ranks(end, [row.mean_target_rank], vocabulary)
            cell = Text.assemble(cell, "  ", (rank.plain, "dim"))
        unread = row.mean_vjp_norm == 0
        matrix = (str(row.kind), row.layer)
        largest[matrix] = max(largest.get(matrix, 0.0), row.mean_vjp_norm)
        rows.setdefault(matrix, {})[row.segment] = Text("·", "dim") if unread else cell
    segments = list(dict.fromkeys(row.segment for row in gradient.segments))
    grid = table("matrix", ">layer", *(f">{segment.replace('_', ' ')}" for segment in segments))
    shown = sorted(rows, key=largest.__getitem__, reverse=True)[:limit]
    for kind, layer in sorted(shown, key=lambda matrix: (matrix[0], -matrix[1])):
        cells = rows[kind, layer]
        grid.add_row(kind, str(layer), *(cells.get(segment, Text("")) for segment in segments))
    note = "each cell: means of |δ| and of the target's rank, which in δ is its promotion rank"
    note += left_out(len(shown), len(rows), "matrices with the largest |δ|")
    return section("By segment of the prompt", grid, note)


def attention_section(gradient: Gradient, rows: int) -> Group:
    """The places of attention with the largest gradients of the score."""
    grid = table(">layer", ">head", "position", "attends to", ">probability", ">dL/da", ">dL/ds")
    found = [place for layer in gradient.attention for place in layer.largest(rows)]
    for place in sorted(found, key=lambda place: -abs(place.score_gradient))[:rows]:
        grid.add_row(
            str(place.layer),
            str(place.head),
            Text(presentation.token_at(place.position, gradient.prompt_tokens), no_wrap=True),
            Text(presentation.token_at(place.source, gradient.prompt_tokens), no_wrap=True),
            probability_cell(place.probability),
            size_cell(place.probability_gradient),
            size_cell(place.score_gradient),
        )
    note = (
        "dL/da and dL/ds: gradients of the loss with respect to the probability and to the score; "
        "a step that raises a score with a negative dL/ds lowers the loss"
    )
    return section("Where the gradients of attention are largest", grid, note)


def verification_line(matrices: Sequence[Matrix]) -> Text:
    """The largest difference between the factors and autograd's dense gradient."""
    checks = [matrix.verification for matrix in matrices if matrix.verification]
    worst = max(checks, key=lambda check: check.relative_error)
    passed = worst.relative_error <= worst.tolerance
    return Text(
        f"{matrices[0].kind} against autograd: relative error at most {worst.relative_error:.1e} "
        f"(tolerance {worst.tolerance:.0e}, {'passed' if passed else 'FAILED'})",
        "" if passed else "bold red",
    )


def _top(read: Projection | None, sought: Sequence[Token]) -> Text:
    return tokens_cell(read.top_tokens[:_EXTRA_TOKENS] if read else (), sought)


def preview_section(preview: EditPreview, title: str) -> Group:
    """One row per prompt: target and prediction before and after the edit."""
    grid = table("prompt", "target", "probability", "rank", "prediction", ">KL, bits")
    for effect in (preview.edited, *preview.probes):
        grid.add_row(*_effect_row(effect))
    note = "before → after the edit; KL: divergence between both predictions"
    return section(title, grid, note)


def _effect_row(effect: Effect) -> list[Text]:
    before = probability_cell(effect.probability_before, effect.log_probability_before)
    after = probability_cell(effect.probability_after, effect.log_probability_after)
    return [
        Text(effect.label or "the edited prompt", no_wrap=True, overflow="ellipsis"),
        token_cell(effect.target),
        _change(before, after),
        _change(rank_cell(effect.rank_before), rank_cell(effect.rank_after)),
        _change(token_cell(effect.predicted_before), token_cell(effect.predicted_after)),
        Text(f"{effect.kl_bits:.3g}"),
    ]


def _change(before: Text, after: Text) -> Text:
    return Text.assemble(before, (" → ", "dim"), after, no_wrap=True)


_STEP = (
    "gradient descent changes each matrix W (y = x W) by -lr Σ xᵀδ, summed over positions; x is "
    "the input, and δ the gradient of the loss with respect to the output (VJP)"
)


def show_gradient(gradient: Gradient, console: Console, rows: int) -> None:
    """Print a gradient: for each kind of matrix a picture, components and requested tables."""
    lines = heading(gradient.prompt_tokens, gradient.provenance)
    loss = presentation.loss_sentence(gradient, likelihood=True)
    lines.add_row("target", sentence(loss, gradient.header.targets))
    lines.add_row("step", Text(_STEP, "dim"))
    console.print(lines)
    for kind in _kinds(gradient):
        matrices = gradient.of_kind(kind)
        console.print(factor_picture(gradient, matrices, rows, console.width))
        console.print(components_section(gradient, matrices, rows))
        _show_extras(matrices, console, gradient, rows)
    if gradient.attention:
        console.print(attention_section(gradient, rows))
    if gradient.segments:
        console.print(segments_section(gradient, rows))
    for limit in presentation.level_sentences(gradient.header.limited_layers):
        console.print(Text(limit, style="dim"))
    if without := gradient.header.layers_without_attention_gradients:
        named = ", ".join(map(str, without))
        console.print(Text(f"no gradients of attention in layers {named}", style="dim"))
    if skipped := gradient.header.skipped:
        console.print(Text(f"not in this architecture: {', '.join(skipped)}", style="dim"))


def _kinds(gradient: Gradient) -> list[MatrixKind | str]:
    """Return the kinds and modules: first those with projected VJPs, then the others."""
    sides = {matrix.kind: matrix.projected_side for matrix in gradient.matrices}
    known = presentation.kinds_of(gradient)
    return sorted(known, key=lambda kind: sides[kind] is not Side.VJP)


def _show_extras(
    matrices: Sequence[Matrix], console: Console, gradient: Gradient, rows: int
) -> None:
    if any(matrix.neurons for matrix in matrices):
        console.print(neuron_changes(matrices, gradient.header.targets, rows))
    if any(matrix.spectrum for matrix in matrices):
        console.print(spectrum_section(matrices, gradient.header.targets, rows))
    if any(matrix.verification for matrix in matrices):
        console.print(verification_line(matrices))

"""The command `januslens intervene`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from januslens import _presentation as presentation
from januslens.arguments import Prompt
from januslens.assemblers import InterveneEvent
from januslens.cli.changes import Changes, with_changes
from januslens.cli.options import (
    COUNT,
    Number,
    estimate_option,
    model_option,
    out_option,
    position_list,
    prompt_argument,
    save_result,
    show_estimate,
    usage_errors,
    with_client,
)
from januslens.cli.tables import (
    Steps,
    console,
    heading,
    labelled,
    probability_cell,
    section,
    sentence,
    signed_cell,
    size_cell,
    steps,
    table,
    tokens_cell,
)
from januslens.client import Client, EventStream
from januslens.interventions import Experiment, SweepOver, noise
from januslens.results.heat_map import HeatMap
from januslens.results.intervene import (
    InterveneHeader,
    InterventionEffect,
    InterventionEffects,
)

_AXES = ("layer", "position", "head", "neuron", "source")


def _axes(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[str] | None:
    """Parse the axes of a sweep, such as `layer,head`."""
    if value is None:
        return None
    axes = [piece.strip().lower() for piece in value.split(",")]
    if not set(axes) <= set(_AXES):
        raise click.BadParameter(f"{value!r} is not a list of {', '.join(_AXES)}.")
    return axes


@click.command()
@click.option(
    "--target",
    help="Token that is measured, for example ' Paris' with its space; default: the prediction.",
)
@click.option("--other", help="Token whose logit is subtracted from that of the target.")
@with_changes
@click.option(
    "--sweep",
    callback=_axes,
    metavar="AXES",
    help="One experiment for each layer, position, head, neuron or source, for example layer,head.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Layers around each layer of the sweep that change together.",
)
@click.option(
    "--corrupt",
    callback=position_list,
    metavar="POSITIONS",
    help="In every experiment, first add noise to the embeddings at these positions.",
)
@click.option(
    "--noise",
    "deviation",
    type=Number(0.0),
    default=0.5,
    show_default=True,
    help="Standard deviation of the noise of --corrupt.",
)
@click.option("--seed", type=COUNT, default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--figure",
    type=click.Choice(["logit", "probability", "logit_difference", "kl_nats"]),
    help="Figure in the heat map; default: logit_difference with --other, otherwise logit.",
)
@model_option
@out_option
@estimate_option
@with_client
@prompt_argument
def intervene(
    client: Client,
    as_json: bool,
    /,
    *,
    prompt: Prompt,
    figure: str | None,
    out: Path | None,
    estimate: bool,
    other: str | None,
    changes: Changes,
    **options: Any,
) -> None:
    """Measure how changes of the forward pass on PROMPT change the prediction.

    Each --zero-heads and each --zero-neurons is one experiment. One change (--zero, --scale,
    --patch-from, --mean-over or --hide) of a --site is another, or --sweep splits it into several.
    For example, head knock-outs are --zero --sweep layer,head, and activation patching is
    --patch-from CLEAN --sweep layer,position. To hide each source in turn, give --hide all --sweep
    source.
    """
    if figure == "logit_difference" and other is None:
        message = "--figure logit_difference needs --other"
        raise click.UsageError(message, click.get_current_context())
    with usage_errors():
        asked = _experiments(changes, **options) | {"other": other}
    if estimate:
        show_estimate(client.estimate_intervene, as_json, prompt, asked)
        return
    with usage_errors():
        stream = client.stream_intervene(prompt, **asked)
    with stream, steps("experiments") as progress:
        found = _followed(stream, progress)
    if not as_json:
        show_effects(found, console(), figure)
    save_result(out, found.save)


def _followed(
    stream: EventStream[InterveneEvent, InterventionEffects], progress: Steps
) -> InterventionEffects:
    for event in stream:
        if isinstance(event, InterveneHeader):
            progress.of(event.experiments)
        elif isinstance(event, InterventionEffect):
            progress.done(f"experiment {event.experiment}")
    return stream.result()


def _experiments(
    changes: Changes,
    *,
    sweep: list[str] | None,
    window: int,
    corrupt: Any,
    deviation: float,
    seed: int,
    **asked: Any,
) -> dict[str, Any]:
    """Return the arguments of `Client.intervene`: `asked`, with experiments, sweep and always."""
    always = [] if corrupt is None else [noise(deviation, seed=seed, positions=corrupt)]
    listed = changes.knock_outs()
    if always:
        listed.append(Experiment(label="noise alone"))
    asked |= {"experiments": listed, "always": always}
    at_site = changes.at_site(sweep or ())
    if at_site is None:
        if sweep:
            raise ValueError("--sweep has nothing to split; give a change such as --zero")
        if not changes.zero_heads and not changes.zero_neurons:
            raise ValueError("no experiments given; give --zero-heads, or a change such as --zero")
    elif sweep:
        asked["sweep"] = SweepOver(at_site, sweep, window)
    else:
        listed.append(Experiment([at_site]))
    return asked


_MAPS = 8


def show_effects(found: InterventionEffects, out: Console, figure: str | None = None) -> None:
    """Print the prediction without interventions, the listed experiments and the heat maps."""
    out.print(heading(found.prompt_tokens, found.provenance))
    lines = labelled()
    for before in found.before:
        parts = presentation.prediction_sentence(before, found.prompt_tokens)
        lines.add_row("target", sentence(parts, [before.target]))
    out.print(lines)
    if any(not effect.coordinates for effect in found.effects):
        out.print(section("Experiments", _listed(found), "logit: its change; KL: in nats"))
    maps = found.heat_maps(figure)
    for one in maps[:_MAPS]:
        out.print(_heat_map(one, out.width))
    if len(maps) > _MAPS:
        out.print(Text(f"\n{len(maps) - _MAPS} more maps; --json prints all effects", "dim"))


def _listed(found: InterventionEffects) -> Table:
    difference = found.before[0].logit_difference is not None
    grid = table("experiment", ">probability", ">rank", ">difference" if difference else ">logit")
    grid.add_column("KL", justify="right")
    grid.add_column("prediction")
    for effect in found.effects:
        if effect.coordinates:
            continue
        for before, after in zip(found.before, effect.after, strict=True):
            change = after.logit - before.logit
            if after.logit_difference is not None and before.logit_difference is not None:
                change = after.logit_difference - before.logit_difference
            grid.add_row(
                Text(effect.label or f"experiment {effect.experiment}"),
                probability_cell(after.probability, after.log_probability),
                Text(str(after.rank)),
                signed_cell(change),
                size_cell(after.kl_nats),
                tokens_cell([token for token, _ in after.top[:1]], [after.target]),
            )
    return grid


_WIDEST = 11  # of a column


def _heat_map(found: HeatMap, width: int) -> Group:
    """Print a heat map in as many tables as the width of the terminal needs."""
    labels = [label[:_WIDEST] for label in found.columns]
    column = max((len(label) for label in labels), default=0)
    column = max(column, 6) + 1
    margin = max((len(label) for label in found.rows), default=0) + 1
    at_once = max(1, (width - margin) // column)
    parts: list[Table] = []
    for start in range(0, len(labels), at_once):
        shown = slice(start, start + at_once)
        grid = table("", *(f">{label}" for label in labels[shown]))
        for label, row in found.printed_rows():
            grid.add_row(Text(label), *(_cell(value, found) for value in row[shown]))
        parts.append(grid)
    return Group(*(section("" if i else found.title, grid) for i, grid in enumerate(parts)))


def _cell(value: float, found: HeatMap) -> Text:
    """A change on its colour, which terminals without colours leave out."""
    if math.isnan(value):  # no experiment
        return Text("")
    colour = presentation.change_colour(value, found.largest)
    style = f"#{bytes(presentation.ink_on(colour)).hex()} on #{bytes(colour).hex()}"
    return Text(presentation.signed(value, found.digits), style, no_wrap=True)

"""The command `januslens edits`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click
from rich.console import Group
from rich.text import Text

from januslens import arguments
from januslens._presentation import measure
from januslens.arguments import Probe
from januslens.cli.options import (
    layer_list,
    matrix_list,
    model_option,
    number_list,
    prompt_argument,
    usage_errors,
    with_client,
)
from januslens.cli.tables import (
    console,
    labelled,
    probability_cell,
    rank_cell,
    section,
    steps,
    table,
    token_cell,
)
from januslens.client import Client
from januslens.results.gradient import EditPreviews, Effect


@click.command()
@click.option("--target", required=True, help="Target tokens, for example ' Paris' with its space.")
@click.option(
    "--lr",
    "learning_rates",
    callback=number_list,
    metavar="RATES",
    help="Learning rates of descent steps, for example 0.01,0.1.",
)
@click.option(
    "--eta",
    "etas",
    callback=number_list,
    metavar="ETAS",
    help="Strengths of forward shifts, instead of --lr.",
)
@click.option("--layers", callback=layer_list, help="Layers, for example 0-3,7; default: all.")
@click.option(
    "--matrices",
    callback=matrix_list,
    help="Matrices of a descent step, for example ff2; default: ff1,ff2.",
)
@click.option(
    "--gradient-cosine",
    is_flag=True,
    help="Also compare each forward shift with a descent step: the cosine of their changes.",
)
@click.option(
    "--probe",
    "probes",
    multiple=True,
    metavar="PROMPT",
    help="Also report this prompt before and after each edit (repeatable).",
)
@model_option
@with_client
@prompt_argument
def edits(
    client: Client,
    as_json: bool,
    /,
    *,
    prompt: arguments.Text | arguments.Chat,
    target: str,
    probes: tuple[str, ...],
    **asked: Any,
) -> None:
    """Compare edits towards --target in each layer and with each strength.

    Each edit changes one layer, by a descent step (--lr) or a forward shift (--eta). Print the
    target's probability and rank after each edit, for PROMPT and for every --probe. The model's
    weights are not changed.
    """
    plain = arguments.Text("") if isinstance(prompt, arguments.Chat) else prompt
    watched = [Probe(replace(plain, text=probe), label=probe) for probe in probes]
    with usage_errors(), steps("edits"):  # the options have the names of the method's arguments
        found = client.preview_edits(prompt, target, probes=watched, **asked)
    if not as_json:
        for number in range(1 + len(watched)):
            console().print(_grid(found, number))


def _grid(found: EditPreviews, number: int) -> Group:
    """One row per layer and one column per strength, for one of the prompts."""
    effects = {
        (cell.layer, cell.strength): (cell.edited, *cell.probes)[number] for cell in found.cells
    }
    first = next(iter(effects.values()))
    cosines = {} if number else _cosines(found)
    headings = [f">{strength:g}" for strength in found.strengths]
    grid = table(">layer", *headings, *([">cosine"] if cosines else []))
    for layer in found.layers:
        row = [effects[layer, strength] for strength in found.strengths]
        grid.add_row(str(layer), *map(_cell, row), *cosines.get(layer, []))
    lines = labelled()
    lines.add_row("prompt", Text(first.label or "the edited prompt"))
    before = probability_cell(first.probability_before, first.log_probability_before)
    reported = Text.assemble(token_cell(first.target), ", probability ", before, ", rank ")
    lines.add_row("before", reported.append_text(rank_cell(first.rank_before)))
    note = "each cell: probability and rank of the target after the edit; columns: strengths"
    if cosines:
        note += f"; cosine: that of the shift by {found.strengths[0]:g} and a descent step on FF2"
    return Group(Text(""), lines, section(f"{first.target} after each edit", grid, note))


def _cosines(found: EditPreviews) -> dict[int, list[str]]:
    """Return the cosine of the first shift of each layer as a cell; none unless requested."""
    return {
        cell.layer: [measure(cell.gradient_cosine)]
        for cell in found.cells
        if cell.gradient_cosine is not None and cell.strength == found.strengths[0]
    }


def _cell(effect: Effect) -> Text:
    after = probability_cell(effect.probability_after, effect.log_probability_after)
    return Text.assemble(after, "  ", rank_cell(effect.rank_after))

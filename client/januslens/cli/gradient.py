"""The command `januslens gradient`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from januslens._arguments import DescentStep, Edit, ForwardShift, Probe, Text
from januslens._assemblers import GradientEvent
from januslens._results.edits import EditPreview
from januslens._results.gradient import Gradient
from januslens._results.matrices import Matrix
from januslens.cli.options import (
    COUNT,
    Number,
    estimate_option,
    layer_list,
    lens_option,
    matrix_list,
    model_option,
    not_both,
    page_option,
    prompt_argument,
    show_estimate,
    usage_errors,
    with_client,
    write_page,
)
from januslens.cli.show_gradient import preview_section, show_gradient
from januslens.cli.tables import Steps, console, steps
from januslens.client import Client, EventStream


@click.command()
@click.option("--target", required=True, help="Target tokens, for example ' Paris' with its space.")
@click.option("--layers", callback=layer_list, help="Layers, for example 0-3,7; default: all.")
@click.option(
    "--matrices",
    callback=matrix_list,
    help="Matrices, for example q,k,v,o; default: ff1 (gate,up if gated) and ff2.",
)
@model_option
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Maximum rows per table.",
)
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
    help="Preview a descent step of --lr on the chosen matrices and layers.",
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
@page_option
@estimate_option
@with_client
@prompt_argument
def gradient(  # noqa: PLR0913 - an option each
    client: Client,
    as_json: bool,
    /,
    *,
    prompt: Text,
    rows: int,
    preview: bool,
    shift: int | None,
    eta: float,
    probes: tuple[str, ...],
    html: Path | None,
    estimate: bool,
    **asked: Any,
) -> None:
    """Show what a gradient step towards --target changes.

    Reads the gradient of each weight matrix in the vocabulary, as the Backward Lens does. With
    --preview or --shift, also shows the probabilities before and after the edit, for PROMPT and
    for every --probe. The model's weights are not changed.
    """
    not_both(as_json, html)
    if estimate:
        show_estimate(client.estimate_gradient_lens, as_json, prompt, asked)
        return
    edits = _edits(preview, shift, eta, asked)
    with usage_errors():  # the other options are named as the verb's arguments
        stream = client.stream_gradient_lens(prompt, **asked)
    with stream, steps("gradients") as progress:
        result = _followed(stream, progress)
    if not as_json:
        show_gradient(result, console(), rows)
    watched = [Probe(replace(prompt, text=probe), label=probe) for probe in probes]
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
    """The edits to preview, by title."""
    edits: dict[str, Edit] = {}
    if preview:
        rate = asked["learning_rate"]
        if not rate:
            context = click.get_current_context()
            raise click.UsageError("--preview needs --lr (the learning rate of the step)", context)
        title = f"What a step of learning rate {rate:g} would do"
        edits[title] = DescentStep(rate, asked["matrices"], asked["layers"])
    if shift is not None:
        title = f"What a forward-pass shift of layer {shift} by {eta:g} would do"
        edits[title] = ForwardShift(shift, eta)
    return edits


def _followed(stream: EventStream[GradientEvent, Gradient], progress: Steps) -> Gradient:
    for event in stream:
        if isinstance(event, Matrix):
            progress.done(event.name)
    return stream.result()

"""`januslens gradient`: what a step of learning would change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from januslens._assemblers import GradientEvent
from januslens._client import Client
from januslens._event_stream import EventStream
from januslens._requests import DescentStep, Edit, ForwardShift, Probe, Text
from januslens._results.edits import EditPreview
from januslens._results.gradient import Gradient
from januslens._results.matrices import Matrix
from januslens.cli.options import (
    COUNT,
    LENS,
    Number,
    estimate_option,
    layer_list,
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


@click.command()
@click.option("--target", required=True, help="What to learn; a leading space counts.")
@click.option("--layers", callback=layer_list, help="E.g. 0-3,7; default: all.")
@click.option("--matrices", callback=matrix_list, help="E.g. q,k,v,o; default: ff1,ff2.")
@model_option
@click.option(
    "--rows", type=click.IntRange(min=1), default=8, show_default=True, help="Of a table at most."
)
@click.option("--subject", metavar="TEXT", help="The prompt's subject: adds a table by segment.")
@click.option("--neurons", type=COUNT, default=0, help="How many of the neurons moved most.")
@click.option(
    "--lr",
    "learning_rate",
    type=Number(),
    help="The step's learning rate, for --neurons and --preview.",
)
@click.option("--spectrum", type=COUNT, default=0, metavar="N", help="How many singular values.")
@click.option("--components", type=COUNT, help="Components a matrix, 0 = all.")
@click.option("--top-k", type=COUNT, help="Most likely tokens of a vector.")
@click.option("--bottom-k", type=COUNT, help="Least likely tokens of a vector.")
@click.option("--lens", type=LENS, default="final_norm", show_default=True)
@click.option("--preview", is_flag=True, help="What a step of --lr on these matrices would do.")
@click.option("--shift", type=COUNT, metavar="LAYER", help="What the forward-pass shift would do.")
@click.option("--eta", type=Number(), default=0.24, show_default=True, help="Strength of --shift.")
@click.option("--probe", "probes", multiple=True, metavar="PROMPT", help="Watch it as well.")
@click.option("--verify", is_flag=True, help="Compare with autograd's dense gradient.")
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
    """Show what a step of learning --target after PROMPT would change.

    What it would imprint on the matrices' inputs, and which way it would shift what they write:
    the Backward Lens's two pictures. With --preview or --shift also what that would do to the
    answer, here and for every --probe; the model stays as it is.
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
    """What is to be previewed, each under its title."""
    edits: dict[str, Edit] = {}
    if preview:
        rate = asked["learning_rate"]
        if not rate:
            context = click.get_current_context()
            raise click.UsageError("--preview needs --lr, the step's learning rate", context)
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

"""The command `januslens open`, which shows saved results."""

from __future__ import annotations

from pathlib import Path

import click
from google.protobuf.json_format import ParseError

from januslens.cli.generate import Typist, show_summary
from januslens.cli.gradient import show_gradient
from januslens.cli.intervene import show_effects
from januslens.cli.options import page_option, rows_option, write_page
from januslens.cli.tables import console
from januslens.cli.trace import show_trace
from januslens.recordings import Recorded, load
from januslens.results.gradient import Gradient
from januslens.results.intervene import InterventionEffects
from januslens.results.trace import Trace


@click.command("open")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@rows_option
@click.option("--details", is_flag=True, help="Also print the heads and neurons of each layer.")
@click.option("--json", "as_json", is_flag=True, help="Print the responses as JSON Lines instead.")
@page_option
def open_recording(
    *, file: Path, rows: int, details: bool, as_json: bool, html: Path | None
) -> None:
    """Show the result in FILE as the command that saved it does.

    FILE was written with --out, with the method `save` of a result, or with --json. No server is
    needed.
    """
    try:
        result = load(file)
    except (ValueError, ParseError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        for line in result.to_json_lines():
            click.echo(line)
    else:
        _show(result, rows, details)
    if html:
        write_page(html, result.to_html())


def _show(result: Recorded, rows: int, details: bool) -> None:
    out = console()
    if isinstance(result, Trace):
        show_trace(result, out, rows, details)
    elif isinstance(result, Gradient):
        show_gradient(result, out, rows)
    elif isinstance(result, InterventionEffects):
        show_effects(result, out)
    else:
        typist = Typist()
        for token in result:
            typist.show(token)
        show_summary(result)

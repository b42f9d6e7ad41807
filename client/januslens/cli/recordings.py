"""The commands `open` and `compare`, which show recorded results."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from google.protobuf.json_format import ParseError
from rich.console import RenderableType
from rich.text import Text

from januslens import _presentation as presentation
from januslens.cli.generate import Typist, show_summary
from januslens.cli.gradient import show_gradient
from januslens.cli.intervene import show_effects
from januslens.cli.options import page_option, rows_option, write_page
from januslens.cli.tables import console, heading, section, signed_cell, table
from januslens.cli.trace import show_trace, story
from januslens.recordings import Recorded, load
from januslens.results.comparison import TraceComparison
from januslens.results.gradient import Gradient
from januslens.results.intervene import InterventionEffects
from januslens.results.kinds import NodeKind
from januslens.results.trace import Trace

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("before", type=_FILE)
@click.argument("after", type=_FILE)
@rows_option
@page_option
def compare(*, before: Path, after: Path, rows: int, html: Path | None) -> None:
    """Compare the traces in BEFORE and AFTER.

    Both are files of `januslens trace --out`: of one prompt on two models, or of two prompts on one
    model. Prompts of different lengths are aligned by their equal tokens at the start and at the
    end. No server is needed.
    """
    traces = [_trace(file) for file in (before, after)]
    compared = traces[0].compare(traces[1], positions=_aligned(*traces))
    out = console()
    for trace in traces:
        out.print(heading(trace.prompt_tokens, trace.provenance))
        out.print(story(trace, trace.target()))
    out.print(comparison_section(compared, rows))
    if html:
        write_page(html, compared.to_html())


def _trace(file: Path) -> Trace:
    result = _loaded(file)
    if not isinstance(result, Trace):
        raise click.ClickException(f"{str(file)!r} has no trace; expected a file of `trace --out`")
    return result


def _aligned(before: Trace, after: Trace) -> Literal["shared"] | None:
    """Align prompts of different lengths by the tokens that both have."""
    same = len(before.prompt_tokens) == len(after.prompt_tokens)
    return None if same else "shared"


# Not the residual stream, which has the contributions of all layers below.
_PARTS = {
    NodeKind.BLOCK_INPUT,
    NodeKind.ATTENTION_OUTPUT,
    NodeKind.HEAD_OUTPUT,
    NodeKind.ATTENTION_BIAS,
    NodeKind.MIXER_OUTPUT,
    NodeKind.MIXER_HEAD,
    NodeKind.MLP_OUTPUT,
    NodeKind.MLP_VALUE,
    NodeKind.MLP_BIAS,
}


def comparison_section(compared: TraceComparison, rows: int) -> RenderableType:
    """One row per node: its contributions in both traces, those that differ most first."""
    if compared.different_parts:
        return Text(f"\n{compared.different_parts}", "dim")
    try:
        edges = compared.changed_contributions()
    except ValueError as error:  # requested without contributions
        return Text(f"\n{error}", "dim")
    grid = table(">before", ">after", ">change", "node")
    parts = [(compared.before.node(edge.before.source), edge) for edge in edges]
    for node, edge in [pair for pair in parts if pair[0].kind in _PARTS][:rows]:
        grid.add_row(
            signed_cell(edge.before.logit_contribution),
            signed_cell(edge.after.logit_contribution),
            signed_cell(edge.contribution_difference),
            Text(presentation.node_name(node, compared.before.prompt_tokens)),
        )
    alone = (
        f"{len(compared.only_before)} nodes only before, {len(compared.only_after)} only after; "
        "a sublayer's result is listed as well as its parts"
    )
    return section("Contributions to the logit that differ most", grid, alone)


@click.command("open")
@click.argument("file", type=_FILE)
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
    result = _loaded(file)
    if as_json:
        for line in result.to_json_lines():
            click.echo(line)
    else:
        _show(result, rows, details)
    if html:
        write_page(html, result.to_html())


def _loaded(file: Path) -> Recorded:
    try:
        return load(file)
    except (ValueError, ParseError) as error:
        raise click.ClickException(str(error)) from error


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

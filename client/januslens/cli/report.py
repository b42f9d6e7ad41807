"""The command `januslens report`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from januslens.cli.options import page_option, rows_option, usage_errors, write_page
from januslens.cli.tables import console, section, table
from januslens.surveys.questions import REPORTS
from januslens.surveys.reports import ReportTable, cell
from januslens.surveys.reports import report as answered

_NAMES = "\n".join(f"  {name:10} {kind.title}" for name, kind in REPORTS.items())


@click.command(
    help=f"""Answer questions from the surveys in one or several folders.

NAME is one of the reports:

\b
{_NAMES}

estimates reads a survey of traces and then surveys of experiments with the same prompts; the other
reports read one survey. No server is needed.
"""
)
@click.argument("name", type=click.Choice(list(REPORTS)), metavar="NAME")
@click.argument(
    "folders",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR...",
)
@rows_option
@click.option("--sql", is_flag=True, help="Print the queries instead of their results.")
@page_option
def report(
    *, name: str, folders: tuple[Path, ...], rows: int, sql: bool, html: Path | None
) -> None:
    """Print the tables of a report, or write them to a page."""
    with usage_errors():
        try:
            found = answered(name, *folders)
        except FileNotFoundError as error:
            raise click.ClickException(f"no survey in {error.filename!r}") from error
    out = console()
    if sql:
        for one in found.tables:
            click.echo(f"-- {one.title}\n{one.query.strip()};\n")
    else:
        out.print(Text(found.title, "bold"))
        out.print(Text(found.source, "dim"))
        for one in found.tables:
            out.print(_section(one, rows))
            for text in one.left_out:
                out.print(Text(f"left out: {text.replace('`', '')}", "yellow"))
    if html:
        write_page(html, found.to_html())


def _section(found: ReportTable, rows: int) -> object:
    frame = found.frame
    grid = table(*(f">{n}" if frame[n].dtype.kind in "fiu" else str(n) for n in frame))
    for row in frame.head(rows).itertuples(index=False):
        grid.add_row(*(Text(cell(value)) for value in row))
    more = f"{rows} of {len(frame)} rows; --rows shows more. " if len(frame) > rows else ""
    return section(found.title, grid, more + found.text.replace("`", ""))

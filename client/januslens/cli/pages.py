"""Answers as pages: the option that names the file, and the writing of it."""

from __future__ import annotations

from pathlib import Path

import click

page_option = click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write the answer as a page too: one file, to open in a browser.",
)


def write_page(path: Path, page: str) -> None:
    """Write a page, and say so beside the answer.

    Raises:
        click.FileError: The file cannot be written.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from error
    click.echo(f"wrote {path} ({len(page.encode()) / 1e3:.0f} kB)", err=True)


def not_both(as_json: bool, page: Path | None) -> None:
    """Refuse a page beside JSON: a page asks for more than the stream that JSON records.

    Raises:
        click.UsageError: Both were asked for.
    """
    if as_json and page:
        message = "expected --json or --html; got both"
        raise click.UsageError(message, click.get_current_context())

"""`januslens ui`: the interactive page against a live server."""

from __future__ import annotations

from functools import partial

import click

from januslens._extras import require
from januslens.cli.session import Connection, usage_errors, with_connection


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the page listens.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8765,
    show_default=True,
    help="0 = any free port.",
)
@click.option("--expose", is_flag=True, help="Allow a --host that other machines can reach.")
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
@with_connection
def ui(connection: Connection, /, *, host: str, port: int, expose: bool, opened: bool) -> None:
    """Serve a page that asks the server while one watches: traces, gradients, edits.

    It listens on loopback and answers only the browser that opens the address it prints.
    """
    for library in ("starlette", "uvicorn"):
        require(library, "ui", "the live page")
    from januslens.ui.gateway import Gateway  # noqa: PLC0415 - these need the libraries
    from januslens.ui.serve import serve  # noqa: PLC0415

    def announce(address: str) -> None:
        click.echo(f"the page is at {address}\nCtrl-C stops it")
        if opened:
            click.launch(address)

    with usage_errors():
        try:
            serve(partial(Gateway, **connection), host, port, exposed=expose, announce=announce)
        except OSError as error:
            raise click.ClickException(f"cannot listen on {host}:{port}: {error}") from error

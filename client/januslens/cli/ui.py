"""`januslens ui`: serve the live page."""

from __future__ import annotations

from functools import partial

import click

from januslens._results.exports import require
from januslens.cli.options import Connection, usage_errors, with_connection


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8765,
    show_default=True,
    help="Port to listen on; 0 = any free port.",
)
@click.option("--expose", is_flag=True, help="Allow a --host that is not a loopback address.")
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
@with_connection
def ui(connection: Connection, /, *, host: str, port: int, expose: bool, opened: bool) -> None:
    """Serve an interactive page for traces, gradients and edits.

    The page listens on loopback and accepts only the browser that opens the printed address.
    """
    for library in ("starlette", "uvicorn"):
        require(library, "ui", "the live page")
    from januslens.ui.app import serve  # noqa: PLC0415 - needs the libraries
    from januslens.ui.rpc_proxy import Gateway  # noqa: PLC0415

    def announce(address: str) -> None:
        click.echo(f"open {address}\npress Ctrl-C to stop")
        if opened:
            click.launch(address)

    with usage_errors():
        try:
            serve(partial(Gateway, **connection), host, port, exposed=expose, announce=announce)
        except OSError as error:
            raise click.ClickException(f"cannot listen on {host}:{port}: {error}") from error

"""The `januslens` command: its subcommands, error messages and exit statuses."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from januslens._connection import REPORT_WAITING
from januslens.cli.admin import admin
from januslens.cli.doctor import doctor
from januslens.cli.edits import edits
from januslens.cli.generate import generate
from januslens.cli.gradient import gradient
from januslens.cli.intervene import intervene
from januslens.cli.lookups import activations, models, neurons, project, tokenize
from januslens.cli.options import Connection, usage_errors, with_connection
from januslens.cli.recordings import compare, open_recording
from januslens.cli.report import report
from januslens.cli.survey import survey
from januslens.cli.trace import trace
from januslens.errors import JanuslensError, Unauthenticated, Unavailable
from januslens.results.exports import require


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
        gateway = Gateway(
            **connection, metadata=[REPORT_WAITING]
        )  # here, where invalid options end the command
        try:
            serve(lambda: gateway, host, port, exposed=expose, announce=announce)
        except OSError as error:
            raise click.ClickException(f"cannot listen on {host}:{port}: {error}") from error


FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130

# Lines below an error, with the options that may mend it.
_CONNECTION = (
    "set the address with --server or JANUSLENS_SERVER; TLS with --secure or --root-certificates"
)
_TOKEN = "set the token with --token or JANUSLENS_TOKEN"  # noqa: S105 - a text


class Program(click.Group):
    """Exits with 0, or with a one-line error: 1 = failed, 2 = wrong usage, 130 = interrupted."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command; report expected exceptions by a message and an exit status."""
        _accept_any_token()
        extra["standalone_mode"] = False
        try:
            status = super().main(*args, **extra)
        except click.exceptions.Abort:
            sys.exit(INTERRUPTED)
        except click.UsageError as error:
            _fail(error.format_message(), _hint(error), WRONG_USAGE)
        except click.ClickException as error:
            _fail(error.format_message(), "", error.exit_code)
        except Unavailable as error:
            _fail(error.message, "" if error.reason else _CONNECTION, FAILED)
        except Unauthenticated as error:
            _fail(error.message, _TOKEN, FAILED)
        except JanuslensError as error:
            _fail(error.message, "", FAILED)
        sys.exit(status if isinstance(status, int) else 0)


def _accept_any_token() -> None:
    """Print escapes for characters that the terminal's encoding cannot represent."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def _hint(error: click.UsageError) -> str:
    context = error.ctx
    if context is None:
        return ""
    if isinstance(error, click.NoSuchOption) and isinstance(context.command, click.Group):
        name, path = error.option_name, context.command_path
        owners = [c for c in context.command.commands.values() if _has(c, name)]
        if owners:
            return f"give {name} after the command, such as '{path} {owners[0].name} {name} ...'"
    return f"try '{context.command_path} --help'"


def _has(command: click.Command, option: str) -> bool:
    """Whether a command, or a command of a group, has an option."""
    if isinstance(command, click.Group) and any(
        _has(inner, option) for inner in command.commands.values()
    ):
        return True
    return any(option in parameter.opts for parameter in command.params)


def _fail(message: str, hint: str, status: int) -> NoReturn:
    one_line = " ".join(message.split())
    click.echo(f"januslens: {one_line}", err=True)
    if hint:
        click.echo(hint, err=True)
    sys.exit(status)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="januslens", message="%(package)s %(version)s")
def januslens() -> None:
    """Show a language model's forward and backward passes in its vocabulary."""


for command in (
    trace,
    gradient,
    edits,
    intervene,
    generate,
    open_recording,
    compare,
    survey,
    report,
    activations,
    neurons,
    project,
    tokenize,
    models,
    admin,
    ui,
    doctor,
):
    januslens.add_command(command)

"""What every subcommand shares: how it reaches the server, and how it refuses arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

import click
from google.protobuf.message import Message

from januslens._client import Client
from januslens._connection import DEFAULT_ADDRESS
from januslens._results.json_lines import json_line
from januslens.cli.interrupt import interruptible
from januslens.cli.parameters import Number

P = ParamSpec("P")

_FILE = click.Path(exists=True, dir_okay=False)

# The options that are a client's arguments as they are.
_CONNECTION = ("token", "secure", "root_certificates", "resume", "timeout")
# A client's arguments, by name.
Connection = dict[str, Any]

_CONNECTION_OPTIONS = (
    click.option(
        "--server",
        metavar="ADDR",
        default=DEFAULT_ADDRESS,
        envvar="JANUSLENS_SERVER",
        show_default=True,
        show_envvar=True,
        help="Where the server listens.",
    ),
    click.option(
        "--token",
        envvar="JANUSLENS_TOKEN",
        show_envvar=True,
        help="Bearer token, where the server wants one.",
    ),
    click.option("--secure", is_flag=True, help="Encrypt, trusting the system's certificates."),
    click.option(
        "--root-certificates",
        type=_FILE,
        envvar="JANUSLENS_ROOT_CERTIFICATES",
        show_envvar=True,
        help="Encrypt, trusting the authorities in this PEM file.",
    ),
    click.option("--client-certificate", type=_FILE, help="PEM file that shows who asks."),
    click.option("--client-key", type=_FILE, help="PEM file with the certificate's private key."),
    click.option("--resume", is_flag=True, help="Ask another replica for the rest of a cut call."),
    click.option(
        "--timeout",
        type=Number(0.001, infinite=True),
        help="Maximum seconds to wait; default: no limit.",
    ),
)

_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the responses: protobuf JSON, one a line."
)

model_option = click.option(
    "--model", default="", metavar="NAME", help="Which model; default: the only one resident."
)


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options by which it reaches its server, as a client's arguments."""

    @functools.wraps(command)
    def run(
        server: str,
        client_certificate: str | None,
        client_key: str | None,
        **others: Any,
    ) -> None:
        connection = {name: others.pop(name) for name in _CONNECTION}
        connection["address"] = server
        connection["client_certificate"] = _pair(client_certificate, client_key)
        command(connection, **others)

    decorated: Callable[..., None] = run
    for option in reversed(_CONNECTION_OPTIONS):
        decorated = option(decorated)
    return decorated


def with_client(command: Callable[Concatenate[Client, bool, P], None]) -> Callable[..., None]:
    """Give a command a client of the server that its options name.

    The command also learns whether it is to print JSON; the client then does so by itself.
    """

    @functools.wraps(command)
    def run(connection: Connection, as_json: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        hook = _print_json if as_json else None
        with (
            Client(**connection, on_response=hook) as client,
            interruptible(client.close),
        ):
            command(client, as_json, *args, **kwargs)

    return with_connection(_json_option(run))


def _pair(certificate: str | None, key: str | None) -> tuple[str, str] | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        message = "expected --client-certificate and --client-key together; got one of them"
        raise click.UsageError(message, click.get_current_context())
    return certificate, key


def _print_json(message: Message) -> None:
    click.echo(json_line(message))


@contextmanager
def usage_errors() -> Iterator[None]:
    """Arguments that the client refuses before it sends anything are wrong usage."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error), click.get_current_context()) from error

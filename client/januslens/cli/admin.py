"""The command group `admin`, which changes the models of a running server."""

from __future__ import annotations

import time

import click

from januslens._connection import poll_seconds
from januslens._presentation import loading_step
from januslens.cli.options import with_client
from januslens.client import Client
from januslens.results.models import Model


@click.group()
def admin() -> None:
    """Load and unload models of a running server (needs the scope `admin`)."""


@admin.command()
@click.argument("name")
@click.argument("source")
@click.option("--revision", default="", help="Branch, tag or commit of a hub model.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the model is loaded.")
@with_client
def load(
    client: Client, as_json: bool, /, *, name: str, source: str, revision: str, no_wait: bool
) -> None:
    """Load the model SOURCE as NAME.

    SOURCE is an absolute path on the server, or a hub id. The server's --loadable lists the allowed
    folders and hub ids. Waits until the model is loaded; exits with 1 if it is FAILED.
    """
    model = client.load_model(name, source, revision=revision)
    started = time.monotonic()
    while model.state == "LOADING" and not no_wait:
        if not as_json:
            click.echo(f"\r{name} LOADING: {loading_step(model):8}", nl=False, err=True)
        time.sleep(poll_seconds(time.monotonic() - started))
        model = client.model(name)
        if not as_json and model.state != "LOADING":
            click.echo(err=True)
    if model.state == "FAILED":
        raise click.ClickException(f"model {name!r} FAILED: {model.state_reason}")
    if not as_json:
        click.echo(_described(model))


@admin.command()
@click.argument("name")
@with_client
def unload(client: Client, as_json: bool, /, *, name: str) -> None:
    """Unload the model NAME, after its running requests."""
    client.unload_model(name)
    if not as_json:
        click.echo(f"{name} unloaded")


def _described(model: Model) -> str:
    if not model.ready:
        return f"{model.name} {model.state}"
    made = model.provenance
    return f"{model.name} READY: {made.architecture}, {made.data_type} on {made.device}"

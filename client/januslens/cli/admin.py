"""The command group `admin`, which changes the models of a running server."""

from __future__ import annotations

import time
from contextlib import closing

import click

from januslens._connection import poll_seconds
from januslens._presentation import loading_step
from januslens.cli.options import Number, WaitingLine, with_client
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
@click.option(
    "--stall-timeout",
    type=Number(0.001, infinite=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop waiting if loading makes no progress for this long.",
)
@with_client
def load(
    client: Client,
    as_json: bool,
    /,
    *,
    name: str,
    source: str,
    revision: str,
    no_wait: bool,
    stall_timeout: float,
) -> None:
    """Load the model SOURCE as NAME.

    SOURCE is an absolute path on the server, or a hub id. The server's --loadable lists the allowed
    folders and hub ids. Waits until the model is loaded; exits with 1 if it is FAILED, or if
    loading makes no progress, which does not end the loading.
    """
    model = client.load_model(name, source, revision=revision)
    if not no_wait:
        with closing(WaitingLine()) as line:
            model = _waited(client, model, stall_timeout, line, as_json=as_json)
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


def _waited(
    client: Client, model: Model, stall_timeout: float, line: WaitingLine, *, as_json: bool
) -> Model:
    """Wait until a model is loaded or FAILED; raise `ClickException` without progress."""
    started = progressed = time.monotonic()
    loaded = _loaded(client)
    while model.state == "LOADING":
        if not as_json:
            line.show(f"{model.name} LOADING: {loading_step(model)}")
        time.sleep(poll_seconds(time.monotonic() - started))
        before, model = model, client.model(model.name)
        now = time.monotonic()
        if model.loaded_fraction > before.loaded_fraction:
            progressed = now
        elif now - progressed > stall_timeout and model.state == "LOADING":
            progressed, earlier, loaded = now, loaded, _loaded(client)
            if loaded == earlier:  # else it waited for another model, which loads first
                raise click.ClickException(_stalled(model, stall_timeout))
    return model


def _loaded(client: Client) -> dict[str, tuple[str, float]]:
    """Return the state of each model, and how much of it is loaded."""
    return {model.name: (model.state, model.loaded_fraction) for model in client.list_models()}


def _stalled(model: Model, seconds: float) -> str:
    return (
        f"no progress of loading {model.name!r} for {seconds:g} s ({loading_step(model)}); the "
        f"server still tries: see its log, or give up with 'januslens admin unload {model.name}'"
    )


def _described(model: Model) -> str:
    if not model.ready:
        return f"{model.name} {model.state}"
    made = model.provenance
    return f"{model.name} READY: {made.architecture}, {made.data_type} on {made.device}"

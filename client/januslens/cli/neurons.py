"""`januslens neurons`: which neurons write a token."""

from __future__ import annotations

from typing import Any

import click

from januslens._client import Client
from januslens.cli.parameters import layer_list
from januslens.cli.session import model_option, usage_errors, with_client
from januslens.cli.show.console import console, steps
from januslens.cli.show.found_neurons import show_found_neurons


@click.command()
@click.argument("written", metavar="TOKEN")  # --token is another
@click.option("--suppressed", is_flag=True, help="Those that push it to the bottom instead.")
@click.option("--layers", callback=layer_list, help="E.g. 0-3,7; default: all.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Neurons at most."
)
@model_option
@with_client
def neurons(client: Client, as_json: bool, /, *, written: str, **asked: Any) -> None:
    """Show the MLP neurons that promote TOKEN, whatever the prompt; a leading space counts.

    A neuron's value is its row of FF2, what it writes when it fires.
    """
    with (
        usage_errors(),
        steps("searching the neurons"),
    ):  # options are named as the verb's arguments
        found = client.find_neurons(written, **asked)
    if not as_json:
        show_found_neurons(found, console())

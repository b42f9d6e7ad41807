"""`--estimate`: what a command's request would take, in place of running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from januslens._requests.inputs import Text
from januslens._results.cost import CostEstimate
from januslens.cli.session import usage_errors
from januslens.cli.show.console import console
from januslens.cli.show.cost import cost_table

estimate_option = click.option(
    "--estimate", is_flag=True, help="Say what it would take, without running it."
)


def show_estimate(
    ask: Callable[..., CostEstimate], as_json: bool, prompt: Text, asked: Mapping[str, Any]
) -> None:
    """Ask with the options that are named as the verb's arguments, and print the answer."""
    with usage_errors():
        cost = ask(prompt, **asked)
    if not as_json:
        console().print(cost_table(cost))

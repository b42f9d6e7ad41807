"""`januslens tokenize`: a text as a model reads it."""

from __future__ import annotations

import click
from rich.text import Text

from januslens._client import Client
from januslens.cli.session import model_option, usage_errors, with_client
from januslens.cli.show.console import console, table


@click.command()
@click.argument("text")
@click.option("--special-tokens", is_flag=True, help="Read TEXT as a prompt, not as a target.")
@click.option("--literal", is_flag=True, help="Read control tokens in TEXT as characters.")
@model_option
@with_client
def tokenize(
    client: Client, as_json: bool, /, *, text: str, special_tokens: bool, literal: bool, model: str
) -> None:
    """Show the tokens of TEXT, by position."""
    with usage_errors():
        tokens = client.tokenize(text, special_tokens=special_tokens, literal=literal, model=model)
    if as_json:
        return
    grid = table(">position", ">id", "token", "bytes", ">characters")
    for position, token in enumerate(tokens):
        characters = "" if token.start is None else f"{token.start}-{token.end}"
        grid.add_row(str(position), str(token.id), Text(str(token)), token.raw.hex(" "), characters)
    console().print(grid)

"""The command `januslens generate`."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any, Literal

import click
from rich.text import Text

from januslens import arguments
from januslens._presentation import model_name
from januslens.cli.changes import Changes, with_changes
from januslens.cli.options import (
    COUNT,
    Number,
    estimate_option,
    layer_list,
    model_option,
    out_option,
    prompt_argument,
    save_result,
    show_estimate,
    usage_errors,
    with_client,
)
from januslens.cli.tables import console, labelled
from januslens.client import Client
from januslens.results.generation import END_OF_SEQUENCE, GeneratedText, GeneratedToken
from januslens.results.tokens import visible

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_ENDS = {
    END_OF_SEQUENCE: "the model ended the text",
    "stop_text": "a --stop text was generated",
    "max_new_tokens": "--max-new-tokens was reached",
    "max_positions": "the model's context is full",
}


def _layers(
    context: click.Context, parameter: click.Parameter, value: str
) -> list[int] | Literal["all"] | None:
    """Parse `all`, `none` or a list of layers."""
    if value == "all":
        return "all"
    return None if value == "none" else layer_list(context, parameter, value)


@click.command()
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="Maximum number of tokens; default: 64."
)
@click.option(
    "--temperature",
    type=Number(0.0),
    default=0.0,
    show_default=True,
    help="Temperature of the draws; 0 = always take the most likely token.",
)
@click.option(
    "--sample-top-k",
    type=COUNT,
    default=0,
    help="Draw from this many of the most likely tokens; default: all.",
)
@click.option(
    "--top-p",
    type=Number(0.0),
    default=0.0,
    help="Draw from the most likely tokens that add up to this probability; default: all.",
)
@click.option("--seed", type=COUNT, default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="Text that ends the generation (repeatable)."
)
@click.option(
    "--read",
    callback=_layers,
    default="all",
    show_default=True,
    metavar="LAYERS",
    help="Layers to read at each token, for example 0-3,7; all or none.",
)
@with_changes
@model_option
@out_option
@estimate_option
@with_client
@prompt_argument
def generate(
    client: Client,
    as_json: bool,
    /,
    *,
    prompt: arguments.Text | arguments.Chat,
    out: Path | None,
    estimate: bool,
    read: list[int] | Literal["all"] | None,
    changes: Changes,
    **asked: Any,
) -> None:
    """Continue PROMPT, and show when each token became the model's prediction.

    Print the text as it is generated. The number after a token is the first layer from which it
    remains the prediction.

    To change the forward passes, give --zero-heads, --zero-neurons, or one change (--zero, --scale,
    --patch-from, --mean-over or --hide) of a --site. Changes apply to PROMPT and to every generated
    token, or with --positions only to these positions of PROMPT.
    """
    with usage_errors():
        asked |= {"layers": read, "interventions": changes.together()}
    asked |= {"top_k": 0, "layer_top_k": 0} if not as_json else {}
    if estimate:
        show_estimate(client.estimate_generate, as_json, prompt, asked)
        return
    with usage_errors():
        stream = client.stream_generate(prompt, **asked)
    with stream:
        typist = Typist()
        for event in stream:
            if isinstance(event, GeneratedToken) and not as_json:
                typist.show(event)
        result = stream.result()
    if not as_json:
        show_summary(result)
    save_result(out, result.save)


class Typist:
    """Prints tokens one by one. Characters may span tokens, so it decodes their bytes."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._console = console()

    def show(self, made: GeneratedToken) -> None:
        """Print the characters that a token completes, and the layer that decided it."""
        text = "".join(c if c in " \n" else visible(c) for c in self._decode(made.token.raw))
        layer = "" if made.decided is None else str(made.decided).translate(_SUPERSCRIPTS)
        # Not wrapped, because the console does not know the current column.
        self._console.print(Text(text), Text(layer, "dim"), sep="", end="", soft_wrap=True)


def show_summary(result: GeneratedText) -> None:
    """Print the model, the number of tokens and why the generation ended."""
    out = console()
    lines = labelled()
    lines.add_row("model", Text(model_name(result.provenance), "dim"))
    end = _ENDS.get(result.finish_reason, result.finish_reason)
    lines.add_row("tokens", Text(f"{len(result)}; {end}"))
    if any(made.layers for made in result):
        lines.add_row("numbers", Text("first layer from which the token remains the prediction"))
    out.print("\n")
    out.print(lines)

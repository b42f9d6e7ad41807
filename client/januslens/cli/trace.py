"""The command `januslens trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from januslens._arguments import Text
from januslens._assemblers import TraceEvent
from januslens._results.trace import LayerGraph, Trace, TraceHeader
from januslens.cli.options import (
    COUNT,
    estimate_option,
    layer_list,
    lens_option,
    model_option,
    not_both,
    page_option,
    position_list,
    prompt_argument,
    show_estimate,
    usage_errors,
    with_client,
    write_page,
)
from januslens.cli.show_trace import show_trace
from januslens.cli.tables import Steps, console, steps
from januslens.client import Client, EventStream


@click.command()
@click.option(
    "--target",
    help="Target token, for example ' Paris' with its space; default: the model's own next token.",
)
@click.option("--layers", callback=layer_list, help="Layers, for example 0-3,7; default: all.")
@click.option(
    "--positions",
    callback=position_list,
    help="Positions, for example -1,3, or all; default: the last.",
)
@model_option
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Maximum rows per table.",
)
@click.option("--details", is_flag=True, help="Also print the heads and neurons of each layer.")
@click.option("--heads", type=COUNT, help="Heads per layer; 0 = all; default: 10.")
@click.option("--memory-values", type=COUNT, help="Source positions per head; 0 = all; default: 2.")
@click.option(
    "--top-neurons",
    type=COUNT,
    help="Most positive neurons per layer; 0 = all; default: 18.",
)
@click.option("--bottom-neurons", type=COUNT, help="Most negative neurons per layer; default: 7.")
@click.option("--top-k", type=COUNT, help="Most likely tokens per vector; default: 5.")
@click.option("--bottom-k", type=COUNT, help="Least likely tokens per vector; default: 5.")
@lens_option
@page_option
@estimate_option
@with_client
@prompt_argument
def trace(
    client: Client,
    as_json: bool,
    /,
    *,
    prompt: Text,
    rows: int,
    details: bool,
    html: Path | None,
    estimate: bool,
    **asked: Any,
) -> None:
    """Show how the model computes its next token after PROMPT.

    Prints how the target's rank changes along the residual stream, and which heads and neurons
    contribute most to it: a summary of the VISIT flow graph.
    """
    not_both(as_json, html)
    if estimate:
        show_estimate(client.estimate_trace, as_json, prompt, asked)
        return
    with usage_errors():  # the other options are named as the verb's arguments
        stream = client.stream_trace(prompt, **asked)
    with stream, steps("tracing") as progress:
        result = _followed(stream, progress)
    if not as_json:
        show_trace(result, console(), rows, details)
    if html:
        write_page(html, result.to_html(_overview(client, result, asked)))


def _overview(client: Client, result: Trace, asked: dict[str, Any]) -> Trace | None:
    """The residual stream at the other positions; None if the trace has all positions."""
    if len(result.targets) == len(result.prompt_tokens):
        return None
    return client.trace_overview(result, lens=asked["lens"], top_k=asked["top_k"] or 3)


def _followed(stream: EventStream[TraceEvent, Trace], progress: Steps) -> Trace:
    for event in stream:
        if isinstance(event, TraceHeader):
            progress.of(len(event.layers))
        elif isinstance(event, LayerGraph):
            progress.done(f"layer {event.layer}")
    return stream.result()

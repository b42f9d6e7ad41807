"""`januslens trace`: where an answer comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from januslens._assemblers import TraceEvent
from januslens._client import Client
from januslens._event_stream import EventStream
from januslens._requests import Text
from januslens._results.trace import LayerGraph, Trace, TraceHeader
from januslens.cli.options import (
    COUNT,
    LENS,
    estimate_option,
    layer_list,
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


@click.command()
@click.option("--target", help="Token to look for, a leading space counts; default: the model's.")
@click.option("--layers", callback=layer_list, help="E.g. 0-3,7; default: all.")
@click.option("--positions", callback=position_list, help="E.g. -1,3 or all; default: the last.")
@model_option
@click.option(
    "--rows", type=click.IntRange(min=1), default=8, show_default=True, help="Of a table at most."
)
@click.option("--details", is_flag=True, help="Heads and neurons layer by layer.")
@click.option("--heads", type=COUNT, help="Heads a layer, 0 = all.")
@click.option("--memory-values", type=COUNT, help="Sources a head, 0 = all.")
@click.option("--top-neurons", type=COUNT, help="Most positive neurons a layer, 0 = all.")
@click.option("--bottom-neurons", type=COUNT, help="Most negative neurons a layer.")
@click.option("--top-k", type=COUNT, help="Most likely tokens of a vector.")
@click.option("--bottom-k", type=COUNT, help="Least likely tokens of a vector.")
@click.option("--lens", type=LENS, default="final_norm", show_default=True)
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
    """Show how the model comes to its answer after PROMPT.

    How the target emerges in the residual stream, which heads and neurons brought it, and by which
    way: the VISIT graph in words.
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
    """What surrounds the trace; nothing does where every position was traced in full."""
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

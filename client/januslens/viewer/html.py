"""Render results as HTML pages.

A page is one file with its program, its style and the messages of the result. Its
Content-Security-Policy forbids all network access: scripts and styles are allowed by hash, images
only from `data:` and `blob:` URLs.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Literal

from google.protobuf.message import Message

from januslens.results.comparison import TraceComparison
from januslens.results.exports import json_line, page_html
from januslens.results.generation import GeneratedText
from januslens.results.gradient import EditPreview, Gradient
from januslens.results.intervene import InterventionEffects
from januslens.results.tokens import OPEN_BOX, Token, visible
from januslens.results.trace import Trace
from januslens.v1 import edits_pb2, gradient_lens_pb2, trace_pb2

View = Literal["trace", "comparison", "gradient", "generation", "effects", "live"]

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<noscript>This page needs JavaScript, which is turned off in this browser.</noscript>
<script type="application/json" id="januslens-page">{description}</script>
{blocks}
<script>{program}</script>
</body>
</html>
"""


def trace_page(
    responses: Iterable[trace_pb2.TraceResponse],
    overview: Iterable[trace_pb2.TraceResponse],
    prompt: Sequence[Token],
    knock_outs: Mapping[str, Iterable[Message]] | None = None,
    names: str = "",
) -> str:
    """Return the page of a trace.

    Args:
        responses: The messages of the trace.
        overview: The messages of its overview, which may be empty.
        prompt: The prompt's tokens, for the title.
        knock_outs: Messages of Intervene for nodes that were set to zero, by node id.
        names: The reader's names and notes of heads and neurons, as in the page's address: a line
            for each, with its key (such as `L9.h6`), its name and its note, separated by tabs.
    """
    measured = {f"knock-out:{node}": messages for node, messages in (knock_outs or {}).items()}
    streams = {"trace": responses, "overview": overview, **measured}
    return page("trace", f"{_text(prompt)} · Januslens", streams, names=names)


def gradient_page(
    responses: Iterable[gradient_lens_pb2.GradientLensResponse],
    previews: Mapping[str, edits_pb2.PreviewEditResponse],
    prompt: Sequence[Token],
) -> str:
    """Return the page of a gradient, without its attention.

    Args:
        responses: The messages of the gradient.
        previews: Previews of edits by title.
        prompt: The prompt's tokens, for the title.
    """
    shown = [response for response in responses if not response.HasField("attention")]
    streams: dict[str, Iterable[Message]] = {"gradient": shown}
    streams |= {f"preview:{name}": [preview] for name, preview in previews.items()}
    return page("gradient", f"{_text(prompt)}, gradient · Januslens", streams)


def page(
    view: View,
    title: str,
    streams: Mapping[str, Iterable[Message]],
    *,
    live: bool = False,
    positions: Mapping[int, int] | None = None,
    names: str = "",
) -> str:
    """Return an HTML file that shows `streams`, the messages of each stream by its name.

    Messages are embedded as canonical protobuf JSON (the output of `--json`), deflated and encoded
    in base64. A `live` page is a frame of the live page, which posts the messages to it. The page
    of a comparison gets the positions of the second prompt by those of the first, and that of a
    trace the `names` of `trace_page`.
    """
    style, program = asset("viewer.css"), asset("viewer.js")
    described: dict[str, object] = {
        "view": view,
        "title": title,
        "version": version("januslens"),
        "live": live,
    }
    if positions is not None:
        described["positions"] = {str(before): after for before, after in positions.items()}
    if names:
        described["names"] = names
    return _PAGE.format(
        policy=_policy(view, style, program),
        title=html.escape(title),
        style=style,
        description=_inert(json.dumps(described)),
        blocks="\n".join(_blocks(streams)),
        program=program,
    )


@cache
def asset(name: str) -> str:
    """Return a file of the built program."""
    return files("januslens.viewer").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(view: View, style: str, program: str) -> str:
    allowed = {
        "default-src": "'none'",
        "script-src": _hash(program),
        "style-src": _hash(style),
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    if view == "live":  # sends requests to its own server, and shows results in frames
        allowed |= {"connect-src": "'self'", "frame-src": "'self'"}
    return "; ".join(f"{directive} {source}" for directive, source in allowed.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _blocks(streams: Mapping[str, Iterable[Message]]) -> Iterator[str]:
    for name, messages in streams.items():
        for message in messages:
            block = base64.b64encode(zlib.compress(json_line(message).encode(), 9)).decode()
            yield f'<script type="text/plain" data-stream="{html.escape(name)}">{block}</script>'


def _inert(text: str) -> str:
    """Escape JSON so that it cannot close the script element around it."""
    return text.replace("<", "\\u003c")


def _text(prompt: Sequence[Token]) -> str:
    raw = b"".join(token.raw or str(token).encode() for token in prompt)
    return visible(raw.decode(errors="replace")).replace(OPEN_BOX, " ").strip()


@page_html.register
def page_of_trace(trace: Trace, overview: Trace | None) -> str:
    """Return the page of a trace and its overview."""
    around = overview.responses if overview else ()
    return trace_page(trace.responses, around, trace.prompt_tokens)


@page_html.register
def page_of_comparison(comparison: TraceComparison, _beside: None) -> str:
    """Return the page of two traces."""
    title = f"{_text(comparison.before.prompt_tokens)}, comparison · Januslens"
    streams = {"before": comparison.before.responses, "after": comparison.after.responses}
    return page("comparison", title, streams, positions=comparison.positions)


@page_html.register
def page_of_gradient(gradient: Gradient, previews: Mapping[str, EditPreview]) -> str:
    """Return the page of a gradient and previews of edits, by title."""
    effects = {title: preview.response for title, preview in previews.items()}
    return gradient_page(gradient.responses, effects, gradient.prompt_tokens)


@page_html.register
def page_of_generation(generation: GeneratedText, others: Mapping[str, GeneratedText]) -> str:
    """Return the page of a generated text and others beside it, by title."""
    beside = {f"generation:{title}": other.responses for title, other in others.items()}
    title = f"{_text(generation.prompt_tokens)}, generation · Januslens"
    return page("generation", title, {"generation": generation.responses, **beside})


@page_html.register
def page_of_effects(effects: InterventionEffects, _beside: None) -> str:
    """Return the page of the effects of experiments."""
    title = f"{_text(effects.prompt_tokens)}, effects · Januslens"
    return page("effects", title, {"effects": effects.responses})

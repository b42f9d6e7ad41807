"""The shell of a page: its program, its style and the streams that it shows, in one HTML file.

Nothing in a page comes from anywhere else, and its Content-Security-Policy forbids it to: scripts
and styles run by their hashes, pictures only from what the page itself draws.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Literal

from google.protobuf.message import Message

from januslens._results.json_lines import json_line

View = Literal["trace", "gradient", "live"]

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
<noscript>This page draws itself with a script that it contains; scripts are turned off.</noscript>
<script type="application/json" id="januslens-page">{description}</script>
{blocks}
<script>{program}</script>
</body>
</html>
"""


def page(
    view: View, title: str, streams: Mapping[str, Iterable[Message]], *, live: bool = False
) -> str:
    """One HTML file that shows `streams`, each a name and its messages in order.

    The messages are embedded as canonical protobuf JSON, what `--json` prints, each deflated and in
    base64: the page inflates them one by one. A `live` page shows what the page around it posts.
    """
    style, program = asset("viewer.css"), asset("viewer.js")
    described = {"view": view, "title": title, "version": version("januslens"), "live": live}
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
    """A file of the built program."""
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
    if view == "live":  # it asks its own server, and shows answers in frames
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
    """JSON that cannot end the element it stands in."""
    return text.replace("<", "\\u003c")

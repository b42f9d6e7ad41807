"""Render a chat template: a program that `models.chat` runs in a separate process.

A chat template is a program in the model's folder, which may be hostile. jinja2's sandbox denies it
access to Python's objects but does not limit its running time. So this process sets limits for
itself, and its parent kills it after a timeout. Each line of standard input has the template and
its variables as JSON, each line of standard output the result as JSON: the `text`, why the template
`refused` the messages, or why it is `unusable`.

The environment has the names that transformers gives to templates
(https://huggingface.co/docs/transformers/chat_templating_writing), because templates are written
for transformers. This file imports neither torch nor the server, so that it starts in a fraction of
a second.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 256 * 2**20
# Processor time of each rendering.
CPU_SECONDS = 1.0
# Lowers the priority, so that templates which compute for long delay the server less.
NICE = 5
# Maximum number of characters of a rendered conversation. A request has at most 4 MiB.
MAX_RENDERED = 8 * 2**20
# Characters of a reason that are kept. A template can raise an error of any length.
MAX_REASON = 1000


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """jinja2's namespace without private attributes, which give access to Python's objects."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")
        super().__setitem__(name, value)


class _Dict:
    """The function `dict`, without the attributes of the class."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(  # transformers' filter: jinja2's own escapes HTML
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - transformers' local time


def rendered(template: str, variables: dict[str, Any]) -> str:
    """Render a template; raises what jinja2 and the template raise."""
    pieces: list[str] = []
    left = MAX_RENDERED
    for piece in compiled(template).generate(variables):
        left -= len(piece)
        if left < 0:
            raise MemoryError
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=1)
def compiled(template: str) -> jinja2.Template:
    """Compile a template, once for all conversations of a request."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "dict": _Dict(),
        "namespace": _Namespace,
        "raise_exception": _raise,
        "strftime_now": _now,
    }
    return environment.from_string(template)


def answered(request: dict[str, Any]) -> dict[str, str]:
    """Answer one request within the limit of processor time; exceeding it ends the process."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        return {"text": rendered(request["template"], request["variables"])}
    except (jinja2.exceptions.TemplateSyntaxError, jinja2.exceptions.SecurityError) as error:
        return {"unusable": str(error)[:MAX_REASON]}
    except jinja2.exceptions.TemplateError as error:
        return {"refused": str(error)[:MAX_REASON]}
    except MemoryError:
        return {"unusable": "it needs too much memory"}
    except Exception as error:  # noqa: BLE001 - a template can raise anything
        return {"unusable": f"{type(error).__name__}: {str(error)[:MAX_REASON]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer the requests of one caller, one on each line, until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    os.nice(NICE)
    for request in sys.stdin:
        sys.stdout.write(json.dumps(answered(json.loads(request))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

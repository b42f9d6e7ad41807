"""Generate the methods of the clients, and the synchronous client from the asynchronous one.

The functions of `januslens/_requests.py` have the arguments of the streaming calls and their
documentation. Each of them becomes three methods, such as `trace`, `stream_trace` and
`estimate_trace`. The synchronous modules are the asynchronous ones without `await`.

python client/generate.py            # write the generated modules
python client/generate.py --check    # fail if one of them differs
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent / "januslens"

# Asynchronous modules, and the synchronous ones that are generated from them.
SYNCHRONOUS = {
    "aio": "client",
    "aio_calls": "calls",
    "aio_lenses": "lenses",
    "aio_passes": "passes",
}

# Regular expressions, matched as whole words, and their replacements. Texts are replaced, too.
SUBSTITUTIONS = (
    (
        "The asynchronous client. The synchronous one, `client.py`, is generated from this module.",
        "The synchronous client. Generated from `aio.py` by client/generate.py; do not edit.",
    ),
    (
        "The synchronous ones, `calls.py`, are generated from this module.",
        "Generated from `aio_calls.py` by client/generate.py; do not edit.",
    ),
    ("(the|The|An?) asynchronous client", r"\1 synchronous client"),
    ("Event loops may share it; it has a connection for each", "Threads may share it"),
    (r"januslens\.aio", "januslens.client"),
    (r"januslens\.aio_(\w+)", r"januslens.\1"),
    ("Async(Channel|Client|EventStream|Generation|Calls|Lenses|Passes)", r"\1"),
    ("StopAsyncIteration", "StopIteration"),
    ("__a(enter|exit|iter|next)__", r"__\1__"),
    ("anext", "next"),
    ("async (def|for|with)", r"\1"),
)


@dataclass(frozen=True)
class Call:
    """A streaming call, whose arguments are those of the function `{name}_request`.

    Attributes:
        name: Name of the method that returns the whole result.
        summary: First line of its documentation.
        stream_summary: First line of the documentation of the method that returns the stream.
        parts: What the stream consists of, between its header and its summary.
        interrupted: Exception for an interrupted stream.
        result: Type of the whole result.
        event: Type of the events.
        assembler: Expression that makes the assembler of the stream.
        notes: A further paragraph about the whole call.
        stream_notes: A further paragraph about the stream.
        returned: The whole result, if its type does not explain it.
    """

    name: str
    summary: str
    stream_summary: str
    parts: str
    interrupted: str
    result: str
    event: str
    assembler: str
    notes: str = ""
    stream_notes: str = ""
    returned: str = ""


LENSES = (
    Call(
        name="trace",
        summary="Trace the forward pass as a flow graph of vectors projected to the vocabulary "
        "(VISIT).",
        stream_summary="Trace the forward pass as in `trace`, and receive each layer when it is "
        "complete.",
        parts="layers",
        interrupted="TraceInterrupted",
        result="Trace",
        event="TraceEvent",
        assembler="TraceAssembler()",
    ),
    Call(
        name="gradient_lens",
        summary="Compute the gradient of every weight matrix as factors, projected to the "
        "vocabulary.",
        notes="Source: Backward Lens (Katz et al., 2024).",
        stream_summary="Compute `gradient_lens`, and receive each matrix when it is complete, last "
        "layer first.",
        parts="matrices",
        interrupted="GradientInterrupted",
        result="Gradient",
        event="GradientEvent",
        assembler="GradientAssembler()",
    ),
)

PASSES = (
    Call(
        name="activations",
        summary="Read tensors of the forward pass, bit for bit those of the model.",
        stream_summary="Read tensors as in `activations`, and receive each one when it is "
        "complete.",
        parts="tensors",
        interrupted="ActivationsInterrupted",
        result="Activations",
        event="ActivationsEvent",
        assembler="ActivationsAssembler()",
    ),
    Call(
        name="intervene",
        summary="Measure the effects of many experiments, each a changed forward pass, in one "
        "request.",
        notes="With `resume=True` of the client, an interrupted stream is requested again as a "
        "whole, and the effects received before are kept.",
        returned="The predictions without interventions, and the effects by number of the "
        "experiment.",
        stream_summary="Measure effects as in `intervene`, and receive each one when it is known.",
        stream_notes="Experiments that change lower layers run first, so their numbers may not "
        "ascend.",
        parts="effects",
        interrupted="InterveneInterrupted",
        result="InterventionEffects",
        event="InterveneEvent",
        assembler="InterveneAssembler()",
    ),
    Call(
        name="generate",
        summary="Continue a prompt, and report what the model and its layers predicted at each "
        "step.",
        stream_summary="Continue a prompt as in `generate`, and receive each token when it is "
        "generated.",
        parts="tokens",
        interrupted="GenerationInterrupted",
        result="AsyncGeneration",
        event="GenerationEvent",
        assembler='GenerateAssembler(partial(AsyncGeneration, client=cast("AsyncClient", self), '
        "changes=tuple(request.interventions)))",
    ),
)

# Generated asynchronous modules: the class, its documentation and its calls.
METHODS = {
    "aio_lenses": ("AsyncLenses", "Project forward and backward passes to the vocabulary.", LENSES),
    "aio_passes": ("AsyncPasses", "Read, change and continue forward passes.", PASSES),
}

GENERATED = "Generated from `_requests.py` by client/generate.py; do not edit."

INVALID = (
    "TypeError: An argument has an invalid type.",
    "ValueError: An argument has a value that no server accepts.",
)
FAILED = "JanuslensError: The call failed; `januslens.errors` has the types."


class Methods:
    """Writes the methods of the streaming calls."""

    def __init__(self) -> None:
        self._tree = ast.parse((PACKAGE / "_requests.py").read_text(encoding="utf-8"))

    def module(self, name: str, documentation: str, calls: tuple[Call, ...]) -> str:
        """Return a module with one class of methods; imports that it does not need included."""
        imports = [
            f"from {node.module} import {alias.name}"
            for node in self._tree.body
            if isinstance(node, ast.ImportFrom) and node.module != "__future__"
            for alias in node.names
        ]
        needed = (
            ["if TYPE_CHECKING:", "    from januslens.aio import AsyncClient"]
            if any("AsyncClient" in call.assembler for call in calls)
            else []
        )
        return "\n".join(
            [
                f'"""{documentation}\n\n{GENERATED}\n"""',
                "from __future__ import annotations",
                "from functools import partial",
                "from typing import TYPE_CHECKING, cast",
                *imports,
                *(f"from januslens._requests import {call.name}_request" for call in calls),
                "from januslens.aio_calls import AsyncCalls, AsyncEventStream, AsyncGeneration",
                *(
                    f"from januslens.assemblers import {imported}"
                    for call in calls
                    for imported in (call.event, call.assembler.partition("(")[0])
                ),
                "from januslens.results.activations import Activations",
                "from januslens.results.gradient import Gradient",
                "from januslens.results.intervene import InterventionEffects",
                "from januslens.results.models import CostEstimate",
                "from januslens.v1 import cost_pb2",
                *needed,
                f"class {name}(AsyncCalls):",
                f'    """{documentation} `AsyncClient` has these methods."""',
                *(textwrap.indent(method, "    ") for call in calls for method in self._of(call)),
            ]
        )

    def _of(self, call: Call) -> Iterator[str]:
        """Yield the three methods of a call."""
        (function,) = (
            node
            for node in self._tree.body
            if isinstance(node, ast.FunctionDef) and node.name == f"{call.name}_request"
        )
        documented = (ast.get_docstring(function) or "").partition("Args:\n")[2].rstrip()
        arguments = [_joined(one) for one in re.split(r"\n(?=    \w)", documented)]
        positional = [argument.arg for argument in function.args.args]
        passed = [*positional, *(f"{one.arg}={one.arg}" for one in function.args.kwonlyargs)]
        partly = f"`partial` has the {call.parts} received."

        def method(
            kind: str, name: str, returned: str, summary: str, sections: list[str], body: str
        ) -> str:
            text = _docstring([summary, *sections])
            signature = f"self, {ast.unparse(function.args)}, timeout: float | None = None"
            return (
                f"{kind} {name}({signature}) -> {returned}:\n{textwrap.indent(text + body, '    ')}"
            )

        def args(scope: str) -> str:
            timeout = f"timeout: Maximum seconds for the {scope}; None = the client's."
            return _section("Args", [*arguments, timeout])

        request = f"request = {call.name}_request({', '.join(passed)})\n"
        yield method(
            "async def",
            call.name,
            call.result,
            call.summary,
            [
                _wrapped(call.notes),
                args("whole stream"),
                _section("Returns", [call.returned] if call.returned else []),
                _section(
                    "Raises",
                    [*INVALID, f"{call.interrupted}: The stream was interrupted; {partly}", FAILED],
                ),
            ],
            f"stream = self.stream_{call.name}({', '.join(passed)}, timeout=timeout)\n"
            "async with stream:\n    return await stream.result()",
        )
        stream = f"A stream of the header, the {call.parts} and the summary. "
        rpc = "".join(word.title() for word in call.name.split("_"))
        yield method(
            "def",
            f"stream_{call.name}",
            f"AsyncEventStream[{call.event}, {call.result}]",
            call.stream_summary,
            [
                _wrapped(call.stream_notes),
                args("whole stream"),
                _section("Returns", [stream + "Use it as a context manager."]),
                _section(
                    "Raises",
                    [*INVALID, f"JanuslensError: While iterating: the call failed; {partly}"],
                ),
            ],
            f'{request}return self._stream("{rpc}", request, timeout, {call.assembler})',
        )
        yield method(
            "async def",
            f"estimate_{call.name}",
            "CostEstimate",
            f"Estimate the cost of `{call.name}` with the same arguments, without running it.",
            [args("call"), _section("Raises", [*INVALID, FAILED])],
            f"{request}return await self._estimate("
            f"cost_pb2.EstimateCostRequest({call.name}=request), timeout)",
        )


# Width of a docstring in a method, without its indentation.
WIDTH = 92


def _joined(text: str) -> str:
    return " ".join(text.split())


def _wrapped(text: str, indent: str = "", further: str = "") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _section(title: str, entries: list[str]) -> str:
    """Return a section of a docstring; empty without entries."""
    further = "    " if title == "Returns" else "        "
    lines = [_wrapped(entry, "    ", further) for entry in entries]
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _docstring(paragraphs: list[str]) -> str:
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    return f'"""{text}\n"""\n'


def synchronous(source: str) -> str:
    """Return the synchronous form of an asynchronous module."""
    for pattern, replacement in SUBSTITUTIONS:
        source = re.sub(rf"(?<!\w){pattern}(?!\w)", replacement, source)
    return re.sub(r"(?<!\w)await ", "", source)


def formatted(source: str, path: Path, rules: str) -> str:
    """Return a module as ruff formats it, with the given rules applied."""
    ruff = [sys.executable, "-m", "ruff"]
    fix = ("check", "--quiet", f"--select={rules}", "--fix")
    for options in (fix, ("format", "--quiet")):
        command = [*ruff, *options, f"--stdin-filename={path}", "-"]
        done = subprocess.run(command, input=source, text=True, check=True, capture_output=True)
        source = done.stdout
    return source


def generated() -> Iterator[tuple[Path, str]]:
    """Yield the paths and texts of the generated modules."""
    methods = Methods()
    made: dict[str, str] = {}
    for module, (name, documentation, calls) in METHODS.items():
        path = PACKAGE / f"{module}.py"
        made[module] = formatted(methods.module(name, documentation, calls), path, "I,F")
        yield path, made[module]
    for module, target in SYNCHRONOUS.items():
        source = made.get(module) or (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        path = PACKAGE / f"{target}.py"
        yield path, formatted(synchronous(source), path, "I")


def main() -> None:
    """Write the generated modules, or check that they are up to date."""
    for path, text in generated():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or text != path.read_text(encoding="utf-8"):
            sys.exit(f"{path} is not up to date: run 'make client' and commit the result")


if __name__ == "__main__":
    main()

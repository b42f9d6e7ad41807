"""Load results that their `save` methods wrote, or that `--json` printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message

from januslens.assemblers import (
    GenerateAssembler,
    GradientAssembler,
    InterveneAssembler,
    TraceAssembler,
    read_lines,
)
from januslens.results.generation import GeneratedText
from januslens.results.gradient import Gradient
from januslens.results.intervene import InterventionEffects
from januslens.results.message_file import encoded_messages, has_messages, message_type
from januslens.results.trace import Trace
from januslens.v1 import generation_pb2, gradient_lens_pb2, intervene_pb2, trace_pb2

Recorded = Trace | Gradient | InterventionEffects | GeneratedText


class _Stream(NamedTuple):
    """A kind of stream: its messages, an event that no other kind has, and its assembler."""

    message: type[Message]
    event: str
    assembler: Callable[[], Any]


_STREAMS = (
    _Stream(trace_pb2.TraceResponse, "layer", TraceAssembler),
    _Stream(gradient_lens_pb2.GradientLensResponse, "matrix", GradientAssembler),
    _Stream(intervene_pb2.InterveneResponse, "effect", InterveneAssembler),
    _Stream(generation_pb2.GenerateResponse, "generated", lambda: GenerateAssembler(GeneratedText)),
)


def load(path: str | PathLike[str]) -> Recorded:
    """Read a result that `save` wrote, or a file with one JSON message per line.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a recording, is cut off, or has a newer version.
        StreamInterrupted: The recording has no summary; `partial` has what was recorded.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line of JSON is not a message of the stream.
    """
    content = Path(path).read_bytes()
    return _of_messages(content, str(path)) if has_messages(content) else _of_json(content, path)


def _of_messages(content: bytes, path: str) -> Recorded:
    name = message_type(content)
    found = [stream for stream in _STREAMS if stream.message.DESCRIPTOR.full_name == name]
    if not found:
        raise ValueError(
            f'"{path}" is a recording of another version; expected version 1 of a trace, a '
            "gradient, effects or a generated text; update januslens"
        )
    assembler = found[0].assembler()
    try:
        for encoded in encoded_messages(content):
            assembler.feed(found[0].message.FromString(encoded))
    except (DecodeError, IndexError) as error:
        raise ValueError(
            f'"{path}" is damaged or cut off; expected whole messages; save the result again'
        ) from error
    result: Recorded = assembler.result()
    return result


def _of_json(content: bytes, path: str | PathLike[str]) -> Recorded:
    try:
        lines = content.decode().splitlines()
        messages = [json.loads(line) for line in lines]
    except ValueError:
        messages = []
    events = {key for message in messages if isinstance(message, dict) for key in message}
    found = [stream for stream in _STREAMS if stream.event in events]
    if not found:
        raise ValueError(
            f'"{path}" is not a recording; expected a file that save() or --out wrote, or JSON '
            "Lines of a trace, a gradient, effects or a generated text; an exported graph is for "
            "other programs, so save the trace as well"
        )
    result: Recorded = read_lines(lines, found[0].message, found[0].assembler())
    return result

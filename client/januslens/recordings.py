"""Save results to files, and load them again.

A recording is a line of text, followed by the messages of the stream in the order in which the
server sent them. Each message has its length before it, as a varint. Files with JSON Lines, which
`to_json_lines` and `--json` write, are read as well; they take about three times the space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from januslens.assemblers import (
    GradientAssembler,
    InterveneAssembler,
    TraceAssembler,
    read_effects,
    read_gradient,
    read_trace,
)
from januslens.results.gradient import Gradient
from januslens.results.intervene import InterventionEffects
from januslens.results.trace import Trace
from januslens.v1 import gradient_lens_pb2, intervene_pb2, trace_pb2

Recorded = Trace | Gradient | InterventionEffects

# The first byte occurs in no text, so that no text file is taken for a recording.
_MAGIC = b"\x89januslens recording "
_VERSION = b"1"
# Bytes of the first line, at most.
_LINE_BYTES = 200

_ASSEMBLERS: dict[str, tuple[type[Message], Callable[[], Any]]] = {
    message.DESCRIPTOR.full_name: (message, assembler)
    for message, assembler in (
        (trace_pb2.TraceResponse, TraceAssembler),
        (gradient_lens_pb2.GradientLensResponse, GradientAssembler),
        (intervene_pb2.InterveneResponse, InterveneAssembler),
    )
}
_OF_JSON: dict[str, Callable[[Iterable[str]], Recorded]] = {
    "layer": read_trace,
    "matrix": read_gradient,
    "effect": read_effects,
}


def save(result: Recorded, path: str | PathLike[str]) -> None:
    """Write a trace, a gradient or effects of interventions to a file that `load` reads."""
    messages = list(result.responses)
    kind = messages[0].DESCRIPTOR.full_name.encode()
    with Path(path).open("wb") as file:
        file.write(_MAGIC + _VERSION + b" " + kind + b"\n")
        for message in messages:
            content = message.SerializeToString(deterministic=True)
            file.write(_varint(len(content)) + content)


def load(path: str | PathLike[str]) -> Recorded:
    """Read a result that `save` wrote, or a file with one JSON message per line.

    Raises:
        ValueError: The file is not a recording, is cut off, or has a newer version.
        StreamInterrupted: The recording has no summary; `partial` has what was recorded.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line of JSON is not a message of the stream.
    """
    content = Path(path).read_bytes()
    if content.startswith(_MAGIC):
        return _assembled(content, str(path))
    try:
        lines = content.decode().splitlines()
        messages = [json.loads(line) for line in lines]
    except ValueError:
        messages = []
    events = {key for message in messages if isinstance(message, dict) for key in message}
    for event, read in _OF_JSON.items():
        if event in events:
            return read(lines)
    raise ValueError(
        f'"{path}" is not a recording; expected a file that save() wrote, or JSON Lines of a '
        "trace, a gradient or effects"
    )


def _assembled(content: bytes, path: str) -> Recorded:
    line = content[len(_MAGIC) : _LINE_BYTES].partition(b"\n")[0]
    version, _, kind = line.partition(b" ")
    known = _ASSEMBLERS.get(kind.decode(errors="replace"))
    if version != _VERSION or known is None:
        raise ValueError(
            f'"{path}" is a recording of another version; expected version '
            f"{_VERSION.decode()} of a trace, a gradient or effects; update januslens"
        )
    message, assembler = known
    found = assembler()
    try:
        for part in _parts(content, len(_MAGIC) + len(line) + 1):
            found.feed(message.FromString(part))
    except (DecodeError, IndexError) as error:
        raise ValueError(
            f'"{path}" is damaged or cut off; expected whole messages; save the result again'
        ) from error
    result: Recorded = found.result()
    return result


def _parts(content: bytes, start: int) -> Iterator[bytes]:
    """Yield the bytes of each message; raise `IndexError` if the last one is cut off."""
    while start < len(content):
        length = shift = 0
        while content[start] >= 0x80:
            length |= (content[start] & 0x7F) << shift
            start, shift = start + 1, shift + 7
        length |= content[start] << shift
        stop = start + 1 + length
        if stop > len(content):
            raise IndexError(stop)
        yield content[start + 1 : stop]
        start = stop


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)

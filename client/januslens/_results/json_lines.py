"""Messages as canonical protobuf JSON, one a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message


def json_line(message: Message) -> str:
    """One message as one line, without its line break.

    Keys are sorted: protobuf leaves the order of a map's entries open, and equal messages should
    give equal lines.
    """
    return MessageToJson(message, indent=None, sort_keys=True)


def json_lines(messages: Iterable[Message]) -> Iterator[str]:
    """Each message as one line."""
    return map(json_line, messages)

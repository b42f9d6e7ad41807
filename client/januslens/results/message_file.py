"""Files with the messages of one stream.

A file has a line of text, followed by the messages in the order in which the server sent them.
Each message has its length before it, as a varint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from google.protobuf.message import Message

# The first byte occurs in no text, so that no text file is taken for a file of messages.
_MAGIC = b"\x89januslens recording "
_VERSION = b"1"
# Bytes of the first line, at most.
_LINE_BYTES = 200


def save_messages(path: str | PathLike[str], messages: Iterable[Message]) -> None:
    """Write the messages of a stream, which all have the same type.

    Raises:
        OSError: The file cannot be written.
    """
    found = list(messages)
    kind = found[0].DESCRIPTOR.full_name.encode()
    with Path(path).open("wb") as file:
        file.write(_MAGIC + _VERSION + b" " + kind + b"\n")
        for message in found:
            content = message.SerializeToString(deterministic=True)
            file.write(_varint(len(content)) + content)


def has_messages(content: bytes) -> bool:
    """Whether the content of a file begins as `save_messages` writes it."""
    return content.startswith(_MAGIC)


def message_type(content: bytes) -> str | None:
    """Return the full name of the messages' type; None if the file has a newer version."""
    version, _, kind = _first_line(content).partition(b" ")
    return kind.decode(errors="replace") if version == _VERSION else None


def encoded_messages(content: bytes) -> Iterator[bytes]:
    """Yield each encoded message.

    Raises:
        IndexError: The last message is cut off.
    """
    start = len(_MAGIC) + len(_first_line(content)) + 1
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


def _first_line(content: bytes) -> bytes:
    """Return the version and the messages' type."""
    return content[len(_MAGIC) : _LINE_BYTES].partition(b"\n")[0]


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)

"""Messages as bytes."""

from __future__ import annotations

from google.protobuf.message import Message


def serialized(message: Message | bytes) -> bytes:
    """Equal messages as equal bytes; bytes as they are.

    Protobuf by itself leaves the order of a map's entries open, and it differs from one process to
    the next.
    """
    if isinstance(message, bytes):
        return message
    return message.SerializeToString(deterministic=True)

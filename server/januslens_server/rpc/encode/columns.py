"""Encode n messages of one type from columns, without a Python call for each message.

The bytes of all messages are written into a matrix with a row for each message. Fields have
different lengths, so a second matrix marks the bytes that are used. The format is that of protocol
buffers: a key (field number and wire type) before each value, and a length before values of
variable length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Integers = NDArray[np.int64]

# Wire types of fields.
VARINT, LENGTH_DELIMITED, FIXED_32 = 0, 2, 5


class Block(NamedTuple):
    """Bytes `[n, width]`, and a mask that marks those in use; None means all of them.

    The mask is `[n, width]`, or `[n, 1]` if all bytes of a row are in use or none.
    """

    data: Bytes
    used: Flags | None


class Cells(NamedTuple):
    """Bytes in consecutive blocks, and the number of bytes in use in each row `[n]`.

    Blocks are joined only once, when all fields of the outermost message are known.
    """

    blocks: list[Block]
    lengths: Integers

    def joined(self) -> tuple[Bytes, Flags]:
        """Return all bytes in one matrix, with a mask of its shape."""
        count, width = len(self.lengths), sum(block.data.shape[1] for block in self.blocks)
        data, used = np.empty((count, width), np.uint8), np.ones((count, width), np.bool_)
        start = 0
        for block in self.blocks:
            columns = slice(start, start + block.data.shape[1])
            data[:, columns] = block.data
            if block.used is not None:
                used[:, columns] = block.used
            start = columns.stop
        return data, used


class Columns:
    """The fields of n messages, added by name, column by column.

    `present` `[n]` says which messages have the field; None means all of them.
    """

    def __init__(self, message: type[Message], count: int) -> None:
        self._message = message
        self._fields = message.DESCRIPTOR.fields_by_name
        self._count = count
        self._blocks: list[Block] = []
        self._lengths = np.zeros(count, np.int64)

    def __len__(self) -> int:
        """Return the number of messages."""
        return self._count

    def unsigned(self, field: str, values: Integers, present: Flags | None = None) -> None:
        """Add integers `[n]`, which are not negative where they are present."""
        if present is not None:
            values = np.where(present, values, 0)
        self._keyed(field, VARINT, varints(values), present)

    def floats(self, field: str, values: NDArray[Any], present: Flags | None = None) -> None:
        """Add float32 numbers `[n]`."""
        self._keyed(field, FIXED_32, _floats(values[:, None]), present)

    def texts(self, field: str, values: Sequence[str]) -> None:
        """Add ASCII strings."""
        lengths = np.fromiter(map(len, values), np.int64, self._count)
        used = np.arange(lengths.max(initial=0)) < lengths[:, None]
        data = np.zeros(used.shape, np.uint8)
        data[used] = np.frombuffer("".join(values).encode("ascii"), np.uint8)
        self.delimited(field, Cells([Block(data, used)], lengths))

    def unsigned_lists(self, field: str, values: Integers, present: Flags | None = None) -> None:
        """Add packed lists `[n, k]` of integers that are not negative."""
        if values.shape[1]:
            self.delimited(field, _side_by_side(varints(values.ravel()), self._count), present)

    def float_lists(self, field: str, values: NDArray[Any], present: Flags | None = None) -> None:
        """Add packed lists `[n, k]` of float32 numbers."""
        if values.shape[1]:
            self.delimited(field, _floats(values), present)

    def message_lists(self, field: str, elements: Columns) -> None:
        """Add lists of k messages each; `elements` has those of all lists, `n * k` in order."""
        if len(elements):
            framed = Columns(self._message, len(elements))
            framed.delimited(field, elements.cells())
            self._add(_side_by_side(framed.cells(), self._count), None)

    def delimited(self, field: str, content: Cells, present: Flags | None = None) -> None:
        """Add strings, bytes, packed lists or messages by their bytes."""
        length = varints(content.lengths)
        both = Cells(length.blocks + content.blocks, length.lengths + content.lengths)
        self._keyed(field, LENGTH_DELIMITED, both, present)

    def cells(self) -> Cells:
        """Return the bytes of the messages."""
        return Cells(self._blocks, self._lengths)

    def _keyed(self, field: str, wire: int, content: Cells, present: Flags | None) -> None:
        """Add a field, whose number must be below 16, with the bytes of its value."""
        key = np.full((self._count, 1), self._fields[field].number << 3 | wire, np.uint8)
        self._add(Cells([Block(key, None), *content.blocks], content.lengths + 1), present)

    def _add(self, content: Cells, present: Flags | None) -> None:
        """Add bytes to the messages that are `present`."""
        if present is None or present.all():
            self._blocks += content.blocks
            self._lengths = self._lengths + content.lengths
        elif present.any():
            rows = present[:, None]
            self._blocks += [
                Block(data, rows if used is None else used & rows) for data, used in content.blocks
            ]
            self._lengths = self._lengths + np.where(present, content.lengths, 0)


class Parts:
    """Encoded elements of a repeated field, which can be merged into the message that has it."""

    def __init__(self, message: type[Message], field: str, elements: Columns) -> None:
        """Encode `elements`, messages of the repeated `field` of `message`."""
        content = elements.cells()
        self.sizes = content.lengths
        framed = Columns(message, len(elements))
        framed.delimited(field, content)
        data, used = framed.cells().joined()
        self._bytes = data[used].tobytes()
        self._ends = np.concatenate([[0], framed.cells().lengths.cumsum()])

    def between(self, start: int, stop: int) -> bytes:
        """Return a message with the elements `start` to `stop`, as bytes."""
        return self._bytes[int(self._ends[start]) : int(self._ends[stop])]


def varints(values: Integers) -> Cells:
    """Return integers `[n]` that are not negative as bytes, 7 bits in each."""
    width = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    if width == 1:
        return Cells(
            [Block(values.astype(np.uint8)[:, None], None)], np.ones(len(values), np.int64)
        )
    groups = values[:, None] >> (7 * np.arange(width))
    used = groups > 0
    used[:, 0] = True
    data = (groups & 0x7F).astype(np.uint8)
    data[:, :-1] |= used[:, 1:].astype(np.uint8) << 7  # another byte follows
    return Cells([Block(data, used)], used.sum(1))


def _floats(values: NDArray[Any]) -> Cells:
    """Return numbers `[n, k]` as little-endian float32."""
    data = np.ascontiguousarray(values, "<f4").view(np.uint8)
    return Cells([Block(data, None)], np.full(len(values), data.shape[1]))


def _side_by_side(cells: Cells, count: int) -> Cells:
    """Return rows `[count * k]` as `count` rows with the bytes of k consecutive ones."""
    data, used = cells.joined()
    lengths = cells.lengths.reshape(count, -1).sum(1)
    return Cells([Block(data.reshape(count, -1), used.reshape(count, -1))], lengths)

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
    """Bytes `[n, width]`, or `[1, width]` if all rows are equal, and a mask of those in use.

    The mask is `[n, width]`, or `[n, 1]` if all bytes of a row are in use or none; None means all.
    """

    data: Bytes
    used: Flags | None


class Cells(NamedTuple):
    """Bytes in consecutive blocks, and the number of bytes in use in each row.

    `lengths` is `[n]`, or one number for all rows. Blocks are joined only once, when all fields of
    the outermost message are known.
    """

    blocks: list[Block]
    lengths: Integers | int

    def joined(self, count: int) -> tuple[Bytes, Flags]:
        """Return all bytes of `count` rows in one matrix, with a mask of its shape."""
        if len(self.blocks) == 1 and self.blocks[0].used is not None:
            return self.blocks[0].data, np.broadcast_to(
                self.blocks[0].used, self.blocks[0].data.shape
            )
        width = sum(block.data.shape[1] for block in self.blocks)
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
    """The fields of n messages, added by name, column by column, in any order.

    `present` `[n]` says which messages have the field; None means all of them. Zeros of fields that
    are not `optional` are left out, as protocol buffers do.
    """

    def __init__(self, message: type[Message], count: int) -> None:
        self._message = message
        self._fields = message.DESCRIPTOR.fields_by_name
        self._count = count
        self._blocks: dict[int, list[Block]] = {}
        self._lengths = np.zeros(count, np.int64)

    def __len__(self) -> int:
        """Return the number of messages."""
        return self._count

    def unsigned(self, field: str, values: Integers, present: Flags | None = None) -> None:
        """Add integers `[n]`, which are not negative where they are present."""
        present = self._not_zero(field, values, present)
        if present is not None:
            if not present.any():
                return
            values = np.where(present, values, 0)
        self._keyed(field, VARINT, varints(values), present)

    def floats(self, field: str, values: NDArray[Any], present: Flags | None = None) -> None:
        """Add float32 numbers `[n]`."""
        values = np.ascontiguousarray(values, "<f4")
        present = self._not_zero(field, values.view(np.uint32), present)
        if present is None or present.any():
            self._keyed(field, FIXED_32, _floats(values[:, None]), present)

    def _not_zero(self, field: str, values: NDArray[Any], present: Flags | None) -> Flags | None:
        """Leave out the zeros of a field that is not optional."""
        if self._fields[field].has_presence or np.count_nonzero(values) == self._count:
            return present
        given: Flags = values != 0
        return given if present is None else present & given

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
            cells = _side_by_side(varints(values.ravel()), *values.shape)
            self.delimited(field, cells, present)

    def float_lists(self, field: str, values: NDArray[Any], present: Flags | None = None) -> None:
        """Add packed lists `[n, k]` of float32 numbers."""
        if values.shape[1]:
            self.delimited(field, _floats(values), present)

    def message_lists(self, field: str, elements: Columns) -> None:
        """Add lists of k messages each; `elements` has those of all lists, `n * k` in order."""
        if len(elements):
            framed = Columns(self._message, len(elements))
            framed.delimited(field, elements.cells())
            each = len(elements) // self._count
            self._add(field, _side_by_side(framed.cells(), self._count, each), None)

    def delimited(self, field: str, content: Cells, present: Flags | None = None) -> None:
        """Add strings, bytes, packed lists or messages by their bytes."""
        if isinstance(content.lengths, int):
            length = _constant(varint(content.lengths))
        else:
            length = varints(content.lengths)
        both = Cells(length.blocks + content.blocks, length.lengths + content.lengths)
        self._keyed(field, LENGTH_DELIMITED, both, present)

    def cells(self) -> Cells:
        """Return the bytes of the messages, with fields in the order of their numbers."""
        blocks = [block for number in sorted(self._blocks) for block in self._blocks[number]]
        return Cells(blocks, self._lengths)

    def _keyed(self, field: str, wire: int, content: Cells, present: Flags | None) -> None:
        """Add a field, whose number must be below 16, with the bytes of its value."""
        key = _constant(bytes([self._fields[field].number << 3 | wire]))
        self._add(field, Cells(key.blocks + content.blocks, content.lengths + 1), present)

    def _add(self, field: str, content: Cells, present: Flags | None) -> None:
        """Add bytes to the messages that are `present`."""
        blocks = self._blocks.setdefault(self._fields[field].number, [])
        if present is None or present.all():
            blocks += content.blocks
            self._lengths = self._lengths + content.lengths
        elif present.any():
            rows = present[:, None]
            blocks += [
                Block(data, rows if used is None else used & rows) for data, used in content.blocks
            ]
            self._lengths = self._lengths + content.lengths * present


class Parts:
    """Encoded elements of a repeated field, which can be merged into the message that has it."""

    def __init__(self, message: type[Message], field: str, elements: Columns) -> None:
        """Encode `elements`, messages of the repeated `field` of `message`."""
        count, content = len(elements), elements.cells()
        self.field = field
        self.sizes = np.zeros(count, np.int64) + content.lengths
        framed = Columns(message, count)
        framed.delimited(field, content)
        data, used = framed.cells().joined(count)
        self._bytes = data[used].tobytes()
        self._ends = np.concatenate([[0], np.cumsum(framed.cells().lengths)])

    def between(self, start: int, stop: int) -> bytes:
        """Return a message with the elements `start` to `stop`, as bytes."""
        return self._bytes[int(self._ends[start]) : int(self._ends[stop])]


def key(message: type[Message], field: str) -> bytes:
    """Return what precedes each value of a field of variable length; its number is below 16."""
    return bytes([message.DESCRIPTOR.fields_by_name[field].number << 3 | LENGTH_DELIMITED])


def with_length(content: bytes) -> bytes:
    """Return bytes after their length, as the value of a field."""
    return varint(len(content)) + content


def varint(value: int) -> bytes:
    """Return an integer that is not negative as bytes, 7 bits in each."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def varints(values: Integers) -> Cells:
    """Return integers `[n]` as `varint` does."""
    width = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    if width == 1:
        return Cells([Block(values.astype(np.uint8)[:, None], None)], 1)
    groups = values[:, None] >> (7 * np.arange(width))
    used = groups > 0
    used[:, 0] = True
    data = (groups & 0x7F).astype(np.uint8)
    data[:, :-1] |= used[:, 1:].astype(np.uint8) << 7  # another byte follows
    return Cells([Block(data, used)], np.add.reduce(used, 1, dtype=np.int64))


def _constant(content: bytes) -> Cells:
    """Return the same bytes in every row."""
    return Cells([Block(np.frombuffer(content, np.uint8)[None], None)], len(content))


def _floats(values: NDArray[Any]) -> Cells:
    """Return numbers `[n, k]` as little-endian float32."""
    data = np.ascontiguousarray(values, "<f4").view(np.uint8)
    return Cells([Block(data, None)], data.shape[1])


def _side_by_side(cells: Cells, count: int, each: int) -> Cells:
    """Return rows `[count * each]` as `count` rows with the bytes of `each` consecutive ones."""
    data, used = cells.joined(count * each)
    if isinstance(cells.lengths, int):
        lengths: Integers | int = each * cells.lengths
    else:
        lengths = cells.lengths.reshape(count, each).sum(1)
    return Cells([Block(data.reshape(count, -1), used.reshape(count, -1))], lengths)

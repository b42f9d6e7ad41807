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

# Wire types of fields.
VARINT, LENGTH_DELIMITED, FIXED_32 = 0, 2, 5


class Cells(NamedTuple):
    """Bytes `[n, width]`, and a mask of the same shape that marks those in use."""

    data: Bytes
    used: Flags

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of bytes in use in each row."""
        lengths: NDArray[np.int64] = self.used.sum(1)
        return lengths


class Columns:
    """The fields of n messages, added by name, column by column.

    `present` `[n]` says which messages have the field; None means all of them.
    """

    def __init__(self, message: type[Message], count: int) -> None:
        self._fields = message.DESCRIPTOR.fields_by_name
        self._count = count
        self._cells: list[Cells] = []

    def unsigned(self, field: str, values: NDArray[np.int64], present: Flags | None = None) -> None:
        """Add integers `[n]`, which are not negative where they are present."""
        present = self._all() if present is None else present
        if present.any():
            self._keyed(field, VARINT, varints(np.where(present, values, 0)), present)

    def floats(self, field: str, values: NDArray[Any], present: Flags | None = None) -> None:
        """Add float32 numbers `[n]`."""
        present = self._all() if present is None else present
        if present.any():
            self._keyed(field, FIXED_32, _fixed(_float_bytes(values[:, None])), present)

    def texts(self, field: str, values: Sequence[str]) -> None:
        """Add ASCII strings."""
        lengths = np.fromiter(map(len, values), np.int64, self._count)
        used = np.arange(lengths.max(initial=0)) < lengths[:, None]
        data = np.zeros(used.shape, np.uint8)
        data[used] = np.frombuffer("".join(values).encode("ascii"), np.uint8)
        self.delimited(field, Cells(data, used))

    def unsigned_lists(
        self, field: str, values: NDArray[np.int64], present: Flags | None = None
    ) -> None:
        """Add packed lists `[n, k]` of integers that are not negative."""
        data, used = varints(values)
        if values.shape[1]:
            self.delimited(field, Cells(_flat(data), _flat(used)), present)

    def float_lists(self, field: str, values: NDArray[Any], present: Flags | None = None) -> None:
        """Add packed lists `[n, k]` of float32 numbers."""
        if values.shape[1]:
            self.delimited(field, _fixed(_float_bytes(values)), present)

    def delimited(self, field: str, content: Cells, present: Flags | None = None) -> None:
        """Add strings, bytes, packed lists or messages by their bytes."""
        length = varints(content.lengths)
        both = Cells(
            np.concatenate([length.data, content.data], 1),
            np.concatenate([length.used, content.used], 1),
        )
        self._keyed(field, LENGTH_DELIMITED, both, present)

    def cells(self) -> Cells:
        """Return the bytes of the messages."""
        if not self._cells:
            return _fixed(np.empty((self._count, 0), np.uint8))
        data = np.concatenate([cells.data for cells in self._cells], 1)
        return Cells(data, np.concatenate([cells.used for cells in self._cells], 1))

    def _keyed(self, field: str, wire: int, content: Cells, present: Flags | None) -> None:
        """Add a field, whose number must be below 16, with the bytes of its value."""
        key = np.full((self._count, 1), self._fields[field].number << 3 | wire, np.uint8)
        used = np.concatenate([np.ones_like(key, np.bool_), content.used], 1)
        if present is not None:
            used &= present[:, None]
        self._cells.append(Cells(np.concatenate([key, content.data], 1), used))

    def _all(self) -> Flags:
        return np.ones(self._count, np.bool_)


class Parts:
    """Encoded elements of a repeated field, which can be merged into the message that has it."""

    def __init__(self, message: type[Message], field: str, elements: Columns) -> None:
        """Encode `elements`, messages of the repeated `field` of `message`."""
        content = elements.cells()
        self.sizes = content.lengths
        framed = Columns(message, len(self.sizes))
        framed.delimited(field, content)
        data, used = framed.cells()
        self._bytes = data[used].tobytes()
        self._ends = np.concatenate([[0], used.sum(1).cumsum()])

    def between(self, start: int, stop: int) -> bytes:
        """Return a message with the elements `start` to `stop`, as bytes."""
        return self._bytes[int(self._ends[start]) : int(self._ends[stop])]


def varints(values: NDArray[np.int64]) -> Cells:
    """Return integers `[...]` that are not negative as bytes `[..., width]`, 7 bits in each."""
    width = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    groups = values[..., None] >> (7 * np.arange(width))
    used = groups > 0
    used[..., 0] = True
    data = (groups & 0x7F).astype(np.uint8)
    data[..., :-1] |= used[..., 1:].astype(np.uint8) << 7  # another byte follows
    return Cells(data, used)


def _float_bytes(values: NDArray[Any]) -> Bytes:
    """Return numbers `[n, k]` as little-endian float32 `[n, 4 k]`."""
    return np.ascontiguousarray(values, "<f4").view(np.uint8)


def _fixed(data: Bytes) -> Cells:
    return Cells(data, np.ones(data.shape, np.bool_))


def _flat(cells: NDArray[Any]) -> NDArray[Any]:
    return cells.reshape(len(cells), -1)

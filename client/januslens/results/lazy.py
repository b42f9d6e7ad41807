"""Sequences of records that are parsed from their messages on first access.

A stream arrives while the server computes, often on the same cores. Parsing the thousands of
records of a trace takes a tenth of a second, and most of them are never accessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar, overload

MessageT = TypeVar("MessageT")
RecordT = TypeVar("RecordT")


class LazySequence(Sequence[RecordT]):
    """As a tuple of records, to which it is equal: its length is known, the rest read at need."""

    def __init__(self, count: int, read: Callable[[], Iterable[RecordT]]) -> None:
        """`read` gives the `count` records, once."""
        self._count = count
        self._read = read

    @classmethod
    def of(
        cls, messages: Collection[MessageT], read: Callable[[MessageT], RecordT]
    ) -> LazySequence[RecordT]:
        """One record for each message."""
        return cls(len(messages), lambda: map(read, messages))

    @cached_property
    def _records(self) -> tuple[RecordT, ...]:
        return tuple(self._read())

    def __len__(self) -> int:
        """Known without reading any."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> RecordT: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[RecordT, ...]: ...

    def __getitem__(self, index: int | slice) -> RecordT | tuple[RecordT, ...]:
        """A record, or a tuple of some."""
        return self._records[index]

    def __iter__(self) -> Iterator[RecordT]:
        """The records in the order they were sent."""
        return iter(self._records)

    def __eq__(self, other: object) -> bool:
        """Whether these are the same records, in a tuple or here."""
        if isinstance(other, LazySequence):
            return self._records == other._records
        return self._records == other

    def __hash__(self) -> int:
        """A tuple's."""
        return hash(self._records)

    def __repr__(self) -> str:
        """A tuple's."""
        return repr(self._records)

    def __reduce__(self) -> tuple[type[tuple[RecordT, ...]], tuple[tuple[RecordT, ...]]]:
        """A copy, or what is stored, is the tuple."""
        return tuple, (self._records,)

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
    """Lazily parsed sequence of records; compares equal to a tuple."""

    def __init__(self, count: int, read: Callable[[], Iterable[RecordT]]) -> None:
        """`read` returns the `count` records; it is called at most once."""
        self._count = count
        self._read = read

    @classmethod
    def of(
        cls, messages: Collection[MessageT], read: Callable[[MessageT], RecordT]
    ) -> LazySequence[RecordT]:
        """Create a sequence with one record per message."""
        return cls(len(messages), lambda: map(read, messages))

    @cached_property
    def _records(self) -> tuple[RecordT, ...]:
        return tuple(self._read())

    def __len__(self) -> int:
        """The number of records; does not parse them."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> RecordT: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[RecordT, ...]: ...

    def __getitem__(self, index: int | slice) -> RecordT | tuple[RecordT, ...]:
        """A record, or for a slice a tuple of records."""
        return self._records[index]

    def __iter__(self) -> Iterator[RecordT]:
        """Iterate over the records in the order of the stream."""
        return iter(self._records)

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence or tuple has equal records."""
        if isinstance(other, LazySequence):
            return self._records == other._records
        return self._records == other

    def __hash__(self) -> int:
        """The hash of the tuple of records."""
        return hash(self._records)

    def __repr__(self) -> str:
        """The representation of the tuple of records."""
        return repr(self._records)

    def __reduce__(self) -> tuple[type[tuple[RecordT, ...]], tuple[tuple[RecordT, ...]]]:
        """Copy and pickle as the tuple of records."""
        return tuple, (self._records,)

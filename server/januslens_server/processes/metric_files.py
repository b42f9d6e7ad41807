"""Reserve disk space for the files in which child processes count their metrics.

prometheus_client maps sparse files into memory. If the disk is full, a write to a page without disk
space ends the process with SIGBUS. So this module reserves every page before it is mapped. If there
is no space, the process counts in its own memory instead and logs a warning. The metrics page does
not include these counts.

prometheus_client cannot remove a series from a file. So this module writes NaN to the series of a
model that is unloaded, which readers skip, and gives their places to new series.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict, mmap_key

logger = logging.getLogger(__name__)

# Bytes reserved for each of the five files of a process, which is more than all series need.
RESERVED_BYTES = 2**20

_Dict: Any = MmapedDict  # prometheus_client has no type annotations


class ReservedFile(_Dict):  # type: ignore[misc]  # the base class has no annotations
    """A file of metric values with disk space reserved for every page."""

    _warned = False
    _m: Any
    _f: Any
    _used: int
    _capacity: int

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        """Open or create the file; if the disk has no space, count in memory."""
        self.shown = True
        # Places of values without a series, by the size of the key before them.
        self._free = defaultdict[int, list[int]](list)
        try:
            if not read_mode:
                _reserve(filename, RESERVED_BYTES)
            super().__init__(filename, read_mode)
        except OSError as error:
            self._count_unseen(filename, error)
        for key in [key for key in self._positions if math.isnan(self.read_value(key)[0])]:
            self._free[_padded(key)].append(self._positions.pop(key))

    @staticmethod
    def read_all_values_from_file(filename: str) -> Iterator[tuple[str, float, float, int]]:
        """Yield key, value, timestamp and position of every series, apart from removed ones."""
        entries = MmapedDict.read_all_values_from_file(filename)  # type: ignore[no-untyped-call]  # no annotations
        return (entry for entry in entries if not math.isnan(entry[1]))

    def remove(self, label: str, value: str) -> None:
        """Remove all series of which a label has this value."""
        for key in [key for key in self._positions if json.loads(key)[2].get(label) == value]:
            self.write_value(key, math.nan, 0.0)
            self._free[_padded(key)].append(self._positions.pop(key))

    def _init_value(self, key: str) -> None:
        """Add a series at the place of a removed one, or at the end after making room for it."""
        if self._free[size := _padded(key)]:
            self._reuse(self._free[size].pop(), key, size)
            return
        needed = self._used + len(key.encode()) + 64
        capacity = self._capacity
        while needed > capacity:
            capacity *= 2
        if capacity > self._capacity:
            self._grow(capacity)
        super()._init_value(key)

    def _reuse(self, position: int, key: str, size: int) -> None:
        """Replace the key of a removed series. Its value, which is NaN, hides it meanwhile."""
        encoded = key.encode()
        entry = struct.pack(f"i{size}s", len(encoded), encoded.ljust(size))
        self._m[position - len(entry) : position] = entry
        self._m[position : position + 16] = bytes(16)
        self._positions[key] = position

    def _grow(self, capacity: int) -> None:
        written = self._m[: self._used]
        try:
            if self.shown:
                _reserve(self._fname, capacity)
                self._m = mmap.mmap(self._f.fileno(), capacity)
        except OSError as error:
            self._warn(error)
        if not self.shown:
            self._m = mmap.mmap(-1, capacity)
            self._m[: len(written)] = written
        self._capacity = capacity

    def _count_unseen(self, filename: str, error: OSError) -> None:
        """Count from zero in this process's own memory."""
        self._f, self._fname = None, filename
        self._positions: dict[str, int] = {}
        self._warn(error)
        self._capacity, self._used = RESERVED_BYTES, 8
        self._m = mmap.mmap(-1, self._capacity)

    def _warn(self, error: OSError) -> None:
        self.shown = False
        if ReservedFile._warned:
            return
        ReservedFile._warned = True
        logger.warning(
            "metrics of this process are incomplete: no space for %s: %s; free some in %s, or set "
            "TMPDIR, and restart",
            Path(self._fname).name,
            error.strerror,
            Path(self._fname).parent.parent,
        )


def _reserve(filename: str, size: int) -> None:
    """Extend the file to `size` bytes with disk space. Raises `OSError` if there is no space."""
    descriptor = os.open(filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        if os.fstat(descriptor).st_size == 0:
            Path(filename).unlink()  # readers would report an empty file as broken
        raise
    finally:
        os.close(descriptor)


def _padded(key: str) -> int:
    """Bytes of a key in a file, with which its value begins at a multiple of eight."""
    size = len(key.encode())
    return size + 8 - (size + 4) % 8


class FileValue:
    """The value of a series in a file of this process, in place of prometheus_client's own class.

    That class keeps the values of removed series.
    """

    _multiprocess = True
    folder: ClassVar[Path]
    number: ClassVar[int]
    files: ClassVar[dict[str, ReservedFile]] = {}
    lock: ClassVar[Lock] = Lock()

    def __init__(
        self,
        kind: str,
        metric: str,
        name: str,
        labels: list[str],
        values: list[str],
        help_text: str,
        multiprocess_mode: str = "",
        **_: Any,
    ) -> None:
        """Continue the value in the file, if there is one; called by prometheus_client."""
        self._key = mmap_key(metric, name, labels, values, help_text)
        prefix = f"{kind}_{multiprocess_mode}" if kind == "gauge" else kind
        with self.lock:
            if prefix not in self.files:
                path = self.folder / f"{prefix}_{self.number}.db"
                self.files[prefix] = ReservedFile(str(path))
            self._file = self.files[prefix]
            self._value = self._file.read_value(self._key)[0]

    def inc(self, amount: float) -> None:
        """Add to the value."""
        with self.lock:
            self._value += amount
            self._file.write_value(self._key, self._value, 0.0)

    def set(self, value: float, timestamp: float | None = None) -> None:
        """Replace the value."""
        with self.lock:
            self._value = value
            self._file.write_value(self._key, value, timestamp or 0.0)

    def get(self) -> float:
        """Return the value."""
        return float(self._value)

    def set_exemplar(self, exemplar: object) -> None:
        """Do nothing: files have no exemplars."""

    def get_exemplar(self) -> None:
        """Return None: files have no exemplars."""


def count_in(folder: Path, number: int) -> None:
    """Count this process's metrics in files with this number.

    A process that replaces it continues the counts. Call this function before any metric is
    declared.
    """
    FileValue.folder, FileValue.number = folder, number
    setattr(values, "ValueClass", FileValue)  # noqa: B010 - prometheus_client chooses by a variable of the environment


def remove_model(name: str) -> None:
    """Remove the series of a model from the files of this process."""
    with FileValue.lock:
        for file in FileValue.files.values():
            file.remove("model", name)

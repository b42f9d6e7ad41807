"""Reserve disk space for the files in which child processes count their metrics.

prometheus_client maps sparse files into memory. If the disk is full, a write to a page without disk
space ends the process with SIGBUS. So this module reserves every page before it is mapped. If there
is no space, the process counts in its own memory instead and logs a warning. The metrics page does
not include these counts.
"""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path
from typing import Any

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

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
        try:
            if not read_mode:
                _reserve(filename, RESERVED_BYTES)
            super().__init__(filename, read_mode)
        except OSError as error:
            self._count_unseen(filename, error)

    def _init_value(self, key: str) -> None:
        """Add a series, after making room for it."""
        needed = self._used + len(key.encode()) + 64
        capacity = self._capacity
        while needed > capacity:
            capacity *= 2
        if capacity > self._capacity:
            self._grow(capacity)
        super()._init_value(key)

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


def count_in(folder: Path, number: int) -> None:
    """Count this process's metrics in files with this number.

    A process that replaces it continues the counts. Call this function before any metric is
    declared.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    setattr(values, "MmapedDict", ReservedFile)  # noqa: B010 - the class that MultiProcessValue uses
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]  # no annotations

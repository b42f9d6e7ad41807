"""Files that a child process counts its metrics in, with their space reserved.

prometheus_client maps sparse files into memory. If the disk fills up, the next write to a page
without space ends the process with SIGBUS. Here every page is reserved before it is mapped; without
space a process counts in its own memory, which the metrics page does not show, and says so once.
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

# Reserved at once, for each of a process's five files: more than all series take.
RESERVED_BYTES = 2**20

_Dict: Any = MmapedDict  # untyped, as shipped


class ReservedFile(_Dict):  # type: ignore[misc]  # likewise
    """A file of counted values whose pages exist on the disk before they are written to."""

    _warned = False
    _m: Any
    _f: Any
    _used: int
    _capacity: int

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        """Open or create the file. Without space, count in memory."""
        self.shown = True
        try:
            if not read_mode:
                _reserve(filename, RESERVED_BYTES)
            super().__init__(filename, read_mode)
        except OSError as error:
            self._count_unseen(filename, error)

    def _init_value(self, key: str) -> None:
        """Make room for one more series, then add it."""
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
        """Start empty, in memory of this process alone."""
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
    """Extend the file to `size` bytes that exist. Raises `OSError` where there is no space."""
    descriptor = os.open(filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        if os.fstat(descriptor).st_size == 0:
            Path(filename).unlink()  # readers take an empty file for a broken one
        raise
    finally:
        os.close(descriptor)


def count_in(folder: Path, number: int) -> None:
    """Keep this process's metrics in files of this number; a replacement continues them.

    Call it before any metric is declared.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    setattr(values, "MmapedDict", ReservedFile)  # noqa: B010 - what MultiProcessValue opens
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]  # as shipped

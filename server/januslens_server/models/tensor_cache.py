"""Cache folder for tensors that are computed once per model, shared with later servers.

Files are safetensors, so reading one runs no code. Nothing in the folder is trusted: a file is used
only if it is a regular file, has the expected description, matches its digest and passes the
caller's check. Otherwise its tensors are computed again and the file is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from januslens_server.errors import readable_size

logger = logging.getLogger(__name__)

DIGEST = "sha256"
PREFIX = "januslens-"
SUFFIX = ".safetensors"
UNFINISHED = ".unfinished"

Tensors = dict[str, torch.Tensor]
# Raises `ValueError` if names, types, shapes or ranges of tensors are not as expected.
Check = Callable[[Tensors], None]


@dataclass(frozen=True)
class TensorCache:
    """A folder of at most `limit` bytes. Least recently used files are removed first.

    Several servers may share it: files appear atomically, and files of other programs are not
    touched. If the folder cannot be read or written, the cache logs one line and is not used.
    """

    folder: Path
    limit: int

    def read(self, about: Mapping[str, str], largest: int, check: Check) -> Tensors | None:
        """Return the tensors written with exactly this description, or None.

        A file is not used if it is larger than `largest` bytes or its tensors fail `check`.
        """
        path = self._path(about)
        try:
            with _opened(path) as file:
                tensors = _parsed(_content(file, largest), about, check)
                os.utime(file.fileno())  # mark as used
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            logger.warning("cannot use cache file %s, computing its tensors again: %s", path, error)
            return None
        return tensors

    def write(self, about: Mapping[str, str], tensors: Tensors) -> None:
        """Store the tensors with this description."""
        path = self._path(about)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.limit:
            logger.warning(
                "cache file %s is not written: its %s exceed the limit", path, readable_size(size)
            )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, tensors, dict(about) | {DIGEST: _digest(tensors)})
            self._remove_old(path)
        except (OSError, SafetensorError) as error:
            logger.warning("cache file %s is not written: %s", path, error)

    def _path(self, about: Mapping[str, str]) -> Path:
        described = "\n".join(f"{key}={value}" for key, value in sorted(about.items()))
        return self.folder / f"{PREFIX}{hashlib.sha256(described.encode()).hexdigest()}{SUFFIX}"

    def _remove_old(self, newest: Path) -> None:
        """Remove this cache's files, least recently used first, until the limit is kept."""
        own = list(self._own_files())
        held = sum(status.st_size for _, status in own)
        for path, status in sorted(own, key=lambda entry: entry[1].st_mtime):
            if held > self.limit and path != newest:
                path.unlink(missing_ok=True)
                held -= status.st_size

    def _own_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for ending in (SUFFIX, UNFINISHED):
            for path in self.folder.glob(f"{PREFIX}*{ending}"):
                with suppress(FileNotFoundError):  # another server has removed it
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        yield path, status


def _opened(path: Path) -> BinaryIO:
    """Open a regular file for reading, without blocking on a FIFO.

    Raises `ValueError` for other kinds of files.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def _content(file: BinaryIO, largest: int) -> bytes:
    content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {readable_size(largest)}")
    return content


def _parsed(content: bytes, about: Mapping[str, str], check: Check) -> Tensors:
    header = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + header])
    if not isinstance(described, dict):
        raise ValueError("its header is not an object")  # noqa: TRY004 - of a file
    tensors = load(content)
    check(tensors)
    if described.get("__metadata__") != dict(about) | {DIGEST: _digest(tensors)}:
        raise ValueError("its description or digest does not match")
    return tensors


def _write(path: Path, tensors: Tensors, described: dict[str, str]) -> None:
    """Write a temporary file and rename it to `path`, so that readers never see a partial file."""
    handle, name = tempfile.mkstemp(UNFINISHED, PREFIX, path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        save_file(tensors, unfinished, described)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()

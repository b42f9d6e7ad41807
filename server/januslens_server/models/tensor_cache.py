"""Tensors that are computed once per model, in files that the next server finds.

Safetensors alone, so that reading a file runs nothing. A file says what it holds and a digest of
it; one that says anything else, or is broken, is passed over and written anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

logger = logging.getLogger(__name__)

DIGEST = "sha256"
PREFIX = "januslens-"
SUFFIX = ".safetensors"
UNFINISHED = ".unfinished"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TensorCache:
    """A folder of at most `limit` bytes; what was used longest ago goes first.

    Several servers may share it: a file appears whole or not at all. What else lies there is left
    alone. A folder that cannot be read or written costs a line in the log and the time to compute
    again, nothing more.
    """

    folder: Path
    limit: int

    def read(self, about: Mapping[str, str]) -> Tensors | None:
        """The tensors that were written under exactly this description; None: there are none."""
        path = self._path(about)
        if not path.exists():
            return None
        try:
            tensors = _read(path, about)
            os.utime(path)  # used now
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("cache file %s is passed over: %s", path, error)
            return None
        return tensors

    def write(self, about: Mapping[str, str], tensors: Tensors) -> None:
        """Keep the tensors for whoever asks for them by this description."""
        path = self._path(about)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.limit:
            logger.warning("cache file %s is not written: %d bytes are too many", path, size)
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
        """Keep within the limit: remove our own files, those used longest ago first."""
        own = [
            (path, path.stat())
            for ending in (SUFFIX, UNFINISHED)
            for path in self.folder.glob(f"{PREFIX}*{ending}")
        ]
        held = sum(status.st_size for _, status in own)
        for path, status in sorted(own, key=lambda entry: entry[1].st_mtime):
            if held > self.limit and path != newest:
                path.unlink(missing_ok=True)
                held -= status.st_size


def _read(path: Path, about: Mapping[str, str]) -> Tensors:
    with safe_open(path, framework="pt") as file:
        described = file.metadata() or {}
        # Copies: the file may be removed while they are in use.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    if described != dict(about) | {DIGEST: _digest(tensors)}:
        raise ValueError("expected what its name stands for and its digest, found something else")
    return tensors


def _write(path: Path, tensors: Tensors, described: dict[str, str]) -> None:
    """Beside its place, then into it at once."""
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

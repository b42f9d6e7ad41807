"""Read the header of a GGUF file, within limits.

A GGUF file holds metadata, the tensors' names, shapes and types, and their values, mostly
quantised (github.com/ggml-org/ggml, docs/gguf.md). The header is read here because the `gguf`
library trusts all sizes in the file. The library dequantises the values.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from januslens_server.errors import ModelFailed
from januslens_server.models.vetting import MAX_TENSORS, MIB

MAGIC, VERSIONS = b"GGUF", (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEYS, MAX_NAME, MAX_TEXT, MAX_DIMENSIONS = 10_000, 1024, MIB, 4
# Bytes of the header, and entries of all of its arrays. Gemma 3's have 6 MiB and 786,000.
MAX_HEADER, MAX_ARRAY_ENTRIES = 128 * MIB, 2_000_000

# The formats of metadata values by type number; 8 is a string and 9 an array.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# What to do about a file that is refused. No tool writes safetensors from a GGUF file.
ADVICE = "serve the checkpoint that it was made from: --model NAME=FOLDER with its safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: `n_bytes` bytes from `start`, of a type such as `Q4_K`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    n_bytes: int

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """The metadata and tensors of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """The architecture's name in the file."""
        return str(self.metadata.get("general.architecture"))

    @property
    def quantization(self) -> str:
        """The types of quantised tensors, such as `GGUF Q4_K, Q6_K`; empty if there are none."""
        kinds = sorted({tensor.kind for tensor in self.tensors.values()} - {"F32", "F16", "BF16"})
        return f"GGUF {', '.join(kinds)}" if kinds else ""

    def stored_bytes(self, tensor: StoredTensor) -> np.ndarray:
        """The bytes of a tensor, which are read when they are used."""
        content = np.memmap(self.path, np.uint8, "r")
        return content[tensor.start : tensor.start + tensor.n_bytes]


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Raises:
        ModelFailed: The file is not GGUF, is cut, or gives sizes that are too large.
    """
    if not path.exists():
        raise ModelFailed("the file does not exist; expected a GGUF file")
    if not path.is_file():
        raise ModelFailed("not a regular file; expected a GGUF file")
    size = path.stat().st_size
    if size < 24:
        raise ModelFailed(f"the file has {size} bytes; expected a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Reader(path, content).header()


class _Reader:
    """A position in a GGUF file, which moves over its header."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 0
        self._entries = 0

    def header(self) -> GGUFHeader:
        if self._take(4) != MAGIC:
            raise ModelFailed("the file does not begin with GGUF; expected a GGUF file")
        version = self._number("I")
        if version not in VERSIONS:
            raise ModelFailed(f"GGUF version {version} is not read; expected 2 or 3")
        n_tensors = self._count("Q", MAX_TENSORS, "tensors")
        n_keys = self._count("Q", MAX_KEYS, "metadata keys")
        metadata = {}
        for _ in range(n_keys):
            key = self._text(MAX_NAME)
            if key in metadata:
                raise ModelFailed(f"the file has the metadata key {key!r} twice")
            metadata[key] = self._value(self._number("I"))
        listed = [self._tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
            raise ModelFailed(f"invalid general.alignment {alignment!r}; expected 1 to 65536")
        data = -(-self._at // alignment) * alignment
        tensors = {t.name: replace(t, start=data + t.start) for t in listed}
        if len(tensors) != n_tensors:
            raise ModelFailed("the file names a tensor twice")
        self._check_places(tensors.values())
        return GGUFHeader(self._path, metadata, tensors)

    def _check_places(self, tensors: Iterable[StoredTensor]) -> None:
        """Refuse tensors beyond the file's end, and those that share bytes of the file.

        Shared bytes would let a small file describe a model of any size.
        """
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            if tensor.start < end:
                raise ModelFailed(f"tensor {tensor.name!r} overlaps another one in the file")
            end = tensor.start + tensor.n_bytes
        if end > len(self._content):
            raise ModelFailed(f"the file is cut: expected {end} bytes, got {len(self._content)}")

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._content):
            raise ModelFailed(f"the file is cut: its header does not end in {self._at} bytes")
        self._at += count
        if self._at > MAX_HEADER:
            raise ModelFailed(
                f"the file's header is too large; expected at most {MAX_HEADER} bytes"
            )
        return self._content[self._at - count : self._at]

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _count(self, form: str, limit: int, what: str) -> int:
        found: int = self._number(form)
        if found > limit:
            raise ModelFailed(f"the file has {found} {what}; expected at most {limit}")
        return found

    def _text(self, limit: int) -> str:
        length = self._count("Q", limit, "bytes in a text")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFailed("a text in the file's header is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text(MAX_TEXT)
        if kind == ARRAY:
            item = self._number("I")
            count = self._count("Q", MAX_ARRAY_ENTRIES - self._entries, "entries in its arrays")
            self._entries += count
            if item == STRING:
                return [self._text(MAX_TEXT) for _ in range(count)]
            form = self._form(item)
            width = struct.calcsize(f"<{form}")
            return list(struct.unpack(f"<{count}{form}", self._take(count * width)))
        return self._number(self._form(kind))

    def _form(self, kind: int) -> str:
        if kind not in SCALARS:
            raise ModelFailed(f"a metadata value has the unknown type {kind}")
        return SCALARS[kind]

    def _tensor(self) -> StoredTensor:
        """Read one entry of the list of tensors; its start counts from the first tensor's."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415 - optional

        name = self._text(MAX_NAME)
        rank = self._count("I", MAX_DIMENSIONS, "dimensions of a tensor")
        shape = tuple(self._number("Q") for _ in range(rank))
        number, offset = self._number("I"), self._number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ModelFailed(f"tensor {name!r} has the unknown type {number}") from error
        block, width = GGML_QUANT_SIZES[kind]
        values, row = math.prod(shape), shape[0] if shape else 1
        if not values:
            raise ModelFailed(f"tensor {name!r} has no values; expected sizes above 0")
        if row % block:
            raise ModelFailed(f"tensor {name!r} has rows of {row}; expected a multiple of {block}")
        return StoredTensor(name, shape, kind.name, offset, values // block * width)

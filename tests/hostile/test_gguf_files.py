"""GGUF files with impossible sizes, counts and places are FAILED in one line, in bounded memory."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.hostile.test_folders import refusal
from tests.loading.test_gguf import NORMAL, UNKNOWN, write

GIB = 2**30
# Types of metadata values, and of tensors.
UINT8, UINT32, TEXT, LIST, UINT64 = 0, 4, 8, 9, 10
FLOAT32, Q8_0 = 0, 8

Entry = tuple[str, int, bytes]
Tensor = tuple[str, Sequence[int], int, int]


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def numbers(item: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + content


def header(entries: Sequence[Entry] = (), tensors: Sequence[Tensor] = ()) -> bytes:
    """Return the bytes of a header, as the format's specification describes it."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(entries))]
    for key, kind, value in entries:
        parts += [text(key.encode()), struct.pack("<I", kind), value]
    for name, shape, kind, offset in tensors:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        parts += [text(name.encode()), sizes, struct.pack("<IQ", kind, offset)]
    return b"".join(parts)


def of(content: bytes, expected: str, size: int = 0) -> Callable[[Path], str]:
    """A file with this content, and zeros that take no space up to `size` bytes."""

    def bomb(path: Path) -> str:
        path.write_bytes(content)
        os.truncate(path, max(size, len(content)))
        return expected

    return bomb


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return "not a regular file"


def folder(path: Path) -> str:
    path.mkdir()
    return "not a regular file"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "not a regular file"


def texts_of_gigabytes(path: Path) -> str:
    """Write 1,000 texts of the largest size, which take no space on disk."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1000))
        for i in range(1000):
            file.write(text(f"key{i}".encode()) + struct.pack("<IQ", TEXT, 2**20))
            file.seek(2**20, os.SEEK_CUR)
        file.truncate()
    return "header is too large; expected at most"


def described(expected: str, **changes: object) -> Callable[[Path], str]:
    """A file of a tiny model with changes of its settings."""

    def bomb(path: Path) -> str:
        write(path, settings=dict(changes))
        return expected

    return bomb


def embeddings_of_another_size(path: Path) -> str:
    """Let one tensor of the tiny model take ten times its size, in a file with enough bytes."""
    content = write(path).read_bytes()
    at = content.index(text(b"blk.0.attn_q.weight")) + 8 + len(b"blk.0.attn_q.weight") + 4
    rows = struct.unpack_from("<Q", content, at + 8)[0]
    last = len(content)  # behind all other tensors
    data = struct.unpack_from("<Q", content, at + 20)[0]
    changed = bytearray(content)
    struct.pack_into("<Q", changed, at + 8, 10 * rows)
    struct.pack_into("<Q", changed, at + 20, data + last)
    path.write_bytes(changed)
    os.truncate(path, 3 * last)
    return "tensor 'blk.0.attn_q.weight' has shape"


def frequencies_of_gigabytes(path: Path) -> str:
    """Let a tensor without values on disk be the divisors of 2^28 frequencies."""
    content = header(
        [
            ("general.architecture", TEXT, text(b"llama")),
            *(
                (f"llama.{key}", UINT32, struct.pack("<I", size))
                for key, size in (
                    ("block_count", 2),
                    ("context_length", 16),
                    ("embedding_length", 32),
                    ("attention.head_count", 4),
                    ("attention.key_length", 2**29),
                )
            ),
        ],
        [("rope_freqs.weight", [2**28], FLOAT32, 0)],
    )
    path.write_bytes(content)
    os.truncate(path, len(content) + 32 + GIB)
    return "268435456 values in rope_freqs.weight"


def tokenizer(expected: str, tokens: list[str], **changes: object) -> Callable[[Path], str]:
    """A file whose SentencePiece tokenizer has these tokens."""

    def bomb(path: Path) -> str:
        kinds = [UNKNOWN, *[NORMAL] * (len(tokens) - 1)]
        found = {"tokens": tokens, "token_type": kinds, "scores": [0.0] * len(tokens)}
        write(path, tokenizer={"model": "llama", "pre": "default", **found, **changes})
        return expected

    return bomb


def with_tensors(*tensors: Tensor, size: int = 4096) -> bytes:
    return header(tensors=tensors) + bytes(size)


LETTERS = ["<unk>", "a", "b"]
FILES: dict[str, Callable[[Path], str]] = {
    "FIFO": fifo,
    "folder": folder,
    "device": device,
    "no bytes": of(b"", "the file has 0 bytes"),
    "gigabyte of zeros": of(b"", "does not begin with GGUF", GIB),
    "text of a gigabyte": of(
        header([("key", TEXT, struct.pack("<Q", GIB))]), "bytes in a text", 2 * GIB
    ),
    "texts of gigabytes together": texts_of_gigabytes,
    "10^9 numbers": of(
        header([("key", LIST, numbers(UINT64, 10**9))]), "entries in its arrays", GIB
    ),
    "many lists of a million": of(
        header([(f"key{i}", LIST, numbers(UINT8, 10**6, bytes(10**6))) for i in range(3)]),
        "entries in its arrays; expected at most 0",
    ),
    "list of lists": of(header([("key", LIST, numbers(LIST, 1))]), "the unknown type 9", 4096),
    "unknown type": of(header([("key", 77, b"")]), "the unknown type 77", 4096),
    "repeated key": of(
        header([("key", UINT8, b"\1"), ("key", UINT8, b"\2")]), "the metadata key 'key' twice"
    ),
    "repeated tensor": of(
        with_tensors(("a", [4], FLOAT32, 0), ("a", [4], FLOAT32, 32)), "names a tensor twice"
    ),
    "overlapping tensors": of(
        with_tensors(("a", [64], FLOAT32, 0), ("b", [64], FLOAT32, 128)),
        "tensor 'b' overlaps another one",
    ),
    "tensors at one place": of(
        with_tensors(*((f"blk.{i}.attn_q.weight", [1024], FLOAT32, 0) for i in range(1000))),
        "overlaps another one",
    ),
    "tensor of 2^126 values": of(
        with_tensors(("a", [2**63, 2**63], FLOAT32, 0)), "the file is cut: expected"
    ),
    "tensor behind the end": of(
        with_tensors(("a", [4], FLOAT32, 2**64 - 1)), "the file is cut: expected"
    ),
    "tensor without values": of(with_tensors(("a", [0, 4], FLOAT32, 0)), "has no values"),
    "quantised number": of(with_tensors(("a", [], Q8_0, 0)), "has rows of 1; expected a multiple"),
    "1,000 dimensions": of(with_tensors(("a", [1] * 1000, FLOAT32, 0)), "dimensions of a tensor"),
    "tensor of an unknown type": of(with_tensors(("a", [4], 999, 0)), "the unknown type 999"),
    "alignment of 0": of(
        header([("general.alignment", UINT32, bytes(4))]), "invalid general.alignment 0"
    ),
    "alignment of gigabytes": of(
        header([("general.alignment", UINT32, struct.pack("<I", 2**31))]),
        "invalid general.alignment",
    ),
    "tensor of another size": embeddings_of_another_size,
    "9,000 layers": described("weights hold only", block_count=9000),
    "frequencies of gigabytes": frequencies_of_gigabytes,
    "no heads": described("file.gguf", **{"attention.head_count": 0}),
    "no layers": described("tensors that are not read", block_count=0),
    "epsilon of NaN": described(
        "rms_epsilon nan, but", **{"attention.layer_norm_rms_epsilon": float("nan")}
    ),
    "token of a megabyte": tokenizer("tokens that are too long", [*LETTERS, "a" * (2**20 - 1)]),
    "scores that are NaN": tokenizer("not finite", LETTERS, scores=[float("nan")] * 3),
    "60,000 control tokens": tokenizer(
        "too many added tokens",
        [*LETTERS, *(f"<{i}>" for i in range(60_000))],
        token_type=[UNKNOWN, 1, 1, *[3] * 60_000],
    ),
}


@pytest.mark.parametrize("file", FILES.values(), ids=list(FILES))
def test_impossible_files_are_refused(tmp_path: Path, file: Callable[[Path], str]) -> None:
    path = tmp_path / "file.gguf"
    expected = file(path)
    assert expected in refusal(path)


def test_unprintable_names_of_files_are_escaped(tmp_path: Path) -> None:
    """Errors name the GGUF files of a folder without config.json."""
    (tmp_path / "\x1b[31m\nready.gguf").touch()
    assert r"\x1b[31m\nready.gguf" in refusal(tmp_path)

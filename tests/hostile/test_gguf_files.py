"""GGUF files with impossible sizes and settings are FAILED in one line, in bounded memory."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from januslens_server.errors import ModelFailed
from januslens_server.models.gguf_families import FAMILIES
from januslens_server.models.gguf_file import read_header
from januslens_server.models.gguf_model import read_configuration
from januslens_server.results import ModelState
from tests.architectures.cases import VOCABULARY
from tests.hostile.test_folders import bounded, refusal, status_of
from tests.loading.gguf_files import BYTE, BYTE_LEVEL, CONTROL, NORMAL, UNKNOWN, write

GIB = 2**30
# Types of metadata values, and of tensors.
UINT8, UINT32, BOOL, TEXT, LIST, UINT64, INT64, FLOAT64 = 0, 4, 7, 8, 9, 10, 11, 12
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
                    ("attention.layer_norm_rms_epsilon", 1),
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
    "no heads": described(
        "invalid setting attention.head_count 0; expected a whole number from 1",
        **{"attention.head_count": 0},
    ),
    "no layers": described(
        "invalid setting block_count 0; expected a whole number from 1", block_count=0
    ),
    "epsilon of NaN": described(
        "rms_epsilon nan; expected a number from",
        **{"attention.layer_norm_rms_epsilon": float("nan")},
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


class Written:
    """A file of a tiny model, which can be written again with other metadata."""

    def __init__(self, path: Path, family: str, tokenizer: dict[str, Any] | None = None) -> None:
        found = read_header(write(path, family, tokenizer=tokenizer))
        start = min(tensor.start for tensor in found.tensors.values())
        self._architecture, self._metadata = found.architecture, found.metadata
        self._values = path.read_bytes()[start:]
        self._tensors = [
            (t.name, t.shape, FLOAT32, t.start - start) for t in found.tensors.values()
        ]

    def changed(self, changes: Mapping[str, Any]) -> bytes:
        """Return the file with these values in its metadata; None removes a key."""
        named = {k.replace("ARCHITECTURE", self._architecture): v for k, v in changes.items()}
        metadata = {**self._metadata, **named}
        entries = [(key, *encoded(value)) for key, value in metadata.items() if value is not None]
        content = header(entries, self._tensors)
        return content + bytes(-len(content) % 32) + self._values


def encoded(value: Any) -> tuple[int, bytes]:
    """Return the type and the bytes of a metadata value; a pair of both is used as it is."""
    match value:
        case tuple():
            return value
        case bool():
            return BOOL, struct.pack("<?", value)
        case int():
            return (
                (UINT64, struct.pack("<Q", value))
                if value >= 0
                else (INT64, struct.pack("<q", value))
            )
        case float():
            return FLOAT64, struct.pack("<d", value)
        case str():
            return TEXT, text(value.encode())
    items = [encoded(item) for item in value]
    return LIST, numbers(items[0][0] if items else UINT8, len(items), b"".join(i[1] for i in items))


# Settings of the tiny models, and others that they could have.
SETTINGS = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.type",
    "vocab_size",
]
TOKENIZER = [*BYTE_LEVEL, "add_bos_token", "add_space_prefix", "scores", "unknown_token_id"]
KEYS = [
    "general.alignment",
    "general.architecture",
    "tokenizer.chat_template",
    *(f"ARCHITECTURE.{key}" for key in SETTINGS),
    *(f"tokenizer.ggml.{key}" for key in TOKENIZER),
]
# Values that claim gigabytes, a list of lists, and an unknown type.
LIES = [
    (TEXT, struct.pack("<Q", 2**33)),
    (LIST, numbers(TEXT, 2**33)),
    (LIST, numbers(UINT64, 2**33)),
    (LIST, numbers(TEXT, 1) + struct.pack("<Q", 2**40)),
    (LIST, numbers(LIST, 1)),
    (77, b""),
]
TOKENS = BYTE_LEVEL["tokens"]
LISTS = [
    *([kind] * VOCABULARY for kind in (-1, NORMAL, CONTROL, BYTE, 77)),
    [math.nan] * VOCABULARY,
    [*TOKENS[1:], "zz"],
    [TOKENS[0]] * VOCABULARY,
    ["a b", "zz yy"],
    ["a  b", " ", ""],
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 8, 31, 32, 2**16, 2**31, 2**40, 2**64 - 1]),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.sampled_from(["linear", "yarn", "llama", "gpt2", "llama-bpe", "{{ x", "\x1b[31m\n"]),
    st.text(max_size=20),
    st.sampled_from(LISTS),
    st.lists(st.integers(-1, VOCABULARY), max_size=5),
    st.sampled_from(LIES),
)
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3)
SENTENCE_PIECE = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", *(f"t{i}" for i in range(VOCABULARY - 2))],
    "token_type": [UNKNOWN, CONTROL, *[NORMAL] * (VOCABULARY - 2)],
    "scores": [-float(i) for i in range(VOCABULARY)],
}


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [("llama", {}), ("mixtral", {}), ("gemma3", SENTENCE_PIECE)],
    ids=["llama", "mixtral", "gemma3"],
)
def test_any_metadata_loads_or_fails_in_one_line(
    family: str, tokenizer: dict[str, Any], tmp_path: Path
) -> None:
    file, path = Written(tmp_path / "written.gguf", family, tokenizer), tmp_path / "file.gguf"
    path.write_bytes(file.changed({}))
    assert status_of(path).state is ModelState.READY

    @settings(max_examples=40, derandomize=True, database=None, deadline=None)
    @given(CHANGES)
    def load(changes: dict[str, Any]) -> None:
        path.write_bytes(file.changed(changes))
        status = status_of(path)
        if status.state is ModelState.FAILED:
            assert status.reason.isprintable()
            assert len(status.reason) < 1500
            assert "config.json" not in status.reason
        else:
            assert status.state is ModelState.READY

    with bounded():
        load()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention.layer_norm_rms_epsilon": math.inf}, "rms_epsilon inf; expected a number"),
        ({"attention.layer_norm_rms_epsilon": None}, "lacks the settings attention.layer_norm_rms"),
        ({"attn_logit_softcapping": 5.0}, "attn_logit_softcapping 5.0, but transformers uses"),
        ({"block_count": 1.0}, "invalid setting block_count 1.0; expected a whole number"),
        ({"context_length": 2**40}, "expected a whole number from 1 to 2147483647"),
        ({"expert_used_count": None}, "lacks the settings expert_used_count"),
        ({"rope.scaling.factor": 0.0}, "invalid setting rope.scaling.factor 0.0; expected a"),
    ],
    ids=str,
)
def test_settings_that_would_change_numbers_unnoticed_are_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.gguf"
    file = Written(path, "mixtral")
    path.write_bytes(file.changed({f"llama.{key}": value for key, value in changes.items()}))
    assert expected in refusal(path)


UNUSABLE = [0, -1, 2**31 - 1, 10**30, True, "x", [], [0], [1, 2, 3], [True] * 3, 1e38, math.nan]


@pytest.mark.parametrize(
    "name",
    ["deepseek2", "gemma4", "lfm2moe", "mistral3 with YaRN", "phi3 with LongRoPE", "qwen35"],
)
def test_settings_of_a_kind_of_layers_load_or_fail_in_one_line(name: str, tmp_path: Path) -> None:
    """The configuration is built, or refused by one of the errors that `load` reports."""
    header, reasons = read_header(write(tmp_path / "tiny.gguf", name)), []
    for key in FAMILIES[header.architecture].own:
        for value in UNUSABLE:
            changed = {**header.metadata, f"{header.architecture}.{key}": value}
            try:
                read_configuration(replace(header, metadata=changed))
            except ModelFailed as error:
                reasons.append(str(error))
    assert reasons
    assert not any("\n" in reason for reason in reasons)

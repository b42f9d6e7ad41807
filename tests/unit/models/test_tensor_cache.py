"""Cache files are found again, never trusted, and kept within the limit."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from januslens_server.models.tensor_cache import DIGEST, TensorCache, Tensors, _digest

ABOUT = {"holds": "numbers", "revision": "abc"}


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache", limit=10**6)


def tensors(seed: int = 0) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (7, 3), dtype=torch.int32, generator=random)
    return {"ids": ids, "values": torch.randn(7, 3, generator=random)}


def read(cache: TensorCache, about: dict[str, str]) -> Tensors | None:
    return cache.read(about, 10**6, expect_two)


def expect_two(found: Tensors) -> None:
    if found.keys() != tensors().keys():
        raise ValueError(f"got {sorted(found)}")


def the_file(cache: TensorCache) -> Path:
    (path,) = cache.folder.iterdir()
    return path


def test_written_tensors_are_read_bit_for_bit(cache: TensorCache) -> None:
    cache.write(ABOUT, tensors())
    found = read(TensorCache(cache.folder, cache.limit), ABOUT)
    assert found is not None
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    assert found["ids"].dtype is torch.int32


@pytest.mark.parametrize("change", [{"revision": "abd"}, {"more": ""}])
def test_other_description_finds_nothing(cache: TensorCache, change: dict[str, str]) -> None:
    cache.write(ABOUT, tensors())
    assert read(cache, ABOUT | change) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(tensors()))


def someone_elses(path: Path) -> None:
    save_file(tensors(), path, {"holds": "something else"})


def without_description(path: Path) -> None:
    save_file(tensors(), path)


def of_other_names(path: Path) -> None:
    """Description and digest are valid, so only the caller's check can refuse it."""
    others = {"idz": tensors()["ids"]}
    save_file(others, path, ABOUT | {DIGEST: _digest(others)})


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def too_large(path: Path) -> None:
    os.truncate(path, 2**40)


BREAKAGES = [
    cut,
    flip_a_bit,
    empty,
    pickled,
    someone_elses,
    without_description,
    of_other_names,
    fifo,
    link,
    too_large,
]


@pytest.mark.parametrize("damage", BREAKAGES, ids=lambda damage: damage.__name__)
def test_invalid_file_is_ignored_and_replaced(
    cache: TensorCache, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    cache.write(ABOUT, tensors())
    damage(the_file(cache))
    assert read(cache, ABOUT) is None
    assert str(the_file(cache)) in caplog.text
    cache.write(ABOUT, tensors(1))
    found = read(cache, ABOUT)
    assert found is not None
    assert torch.equal(found["values"], tensors(1)["values"])


def test_renamed_file_is_not_used(cache: TensorCache) -> None:
    """The description inside the file must match, not only its name."""
    cache.write(ABOUT, tensors())
    first = the_file(cache)
    other = ABOUT | {"revision": "other"}
    cache.write(other, tensors(1))
    (second,) = set(cache.folder.iterdir()) - {first}
    first.replace(second)
    assert read(cache, other) is None


def test_least_recently_used_files_are_removed_first(tmp_path: Path) -> None:
    TensorCache(tmp_path, limit=10**6).write({"number": "0"}, tensors(0))
    cache = TensorCache(tmp_path, limit=3 * next(tmp_path.iterdir()).stat().st_size)
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    for i in range(3):
        cache.write({"number": str(i)}, tensors(i))
        for path in tmp_path.glob("*.safetensors"):
            status = path.stat()
            os.utime(path, (status.st_atime - 100, status.st_mtime - 100))
    assert read(cache, {"number": "0"}) is not None  # used now
    cache.write({"number": "3"}, tensors(3))
    held = [i for i in range(4) if read(cache, {"number": str(i)}) is not None]
    assert held == [0, 2, 3]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= cache.limit
    assert foreign.read_text() == "mine"


def test_tensors_above_the_limit_are_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path, limit=10)
    cache.write(ABOUT, tensors())
    assert list(tmp_path.iterdir()) == []
    assert "exceed the limit" in caplog.text


def test_unwritable_folder_logs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file", limit=10**6)
    cache.write(ABOUT, tensors())
    assert read(cache, ABOUT) is None
    assert "is not written" in caplog.text


def test_failed_write_leaves_no_file(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("januslens_server.models.tensor_cache.save_file", full)
    cache.write(ABOUT, tensors())
    assert list(cache.folder.iterdir()) == []
    assert "no space left" in caplog.text

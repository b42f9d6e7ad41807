"""Models of the hub: from its cache, at the commit that a revision names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from januslens_server.errors import ModelFailed
from januslens_server.models.loader import ModelSource, load
from tests.architectures.cases import CASES
from tests.loading.folders import saved

GPT2 = next(case for case in CASES if case.id == "gpt2-plain")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Yield the snapshot of branch `main` of `someone/tiny` in a separate cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    source = saved(GPT2, tmp_path / "model")
    shutil.copytree(source.location, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_model_is_served_at_its_commit(cached: Path, revision: str | None) -> None:
    assert cached.is_dir()
    model = load(ModelSource("tiny", "someone/tiny", revision))
    assert model.provenance.revision == COMMIT


def test_another_revision_is_refused(cached: Path) -> None:
    assert cached.is_dir()
    with pytest.raises(ModelFailed, match="not found: expected a folder or the id of a hub model"):
        load(ModelSource("tiny", "someone/tiny", "other"))


def test_missing_weights_of_a_cached_model_are_reported(cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    with pytest.raises(ModelFailed, match=r"file .model\.safetensors. is missing"):
        load(ModelSource("tiny", "someone/tiny"))

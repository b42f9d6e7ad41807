"""`make release` refuses a version that the changelog does not have."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tests.deploy.manifests import DEPLOY


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script `deploy/release.py`, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("release", DEPLOY / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "release", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "heading", "reason"),
    [
        ("0.1.0", "## [Unreleased]", r"expected \[0.1.0\] first, found Unreleased"),
        ("0.1.0", "## [0.2.0] - 2027-01-31", r"expected \[0.1.0\] first, found 0.2.0"),
        ("0.1.0", "## [0.1.0]", r"\[0.1.0\] has no date"),
        ("0.2.0.dev0", "## [0.1.0] - 2027-01-31", r"expected \[Unreleased\] first"),
        ("0.1.0", "no heading", "found no section"),
    ],
)
def test_version_and_changelog_must_agree(
    release: ModuleType, tmp_path: Path, version: str, heading: str, reason: str
) -> None:
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n- A change.\n")
    with pytest.raises(release.ReleaseError, match=reason):
        release.checked_version(tmp_path)


def test_the_changelog_has_the_version_of_this_commit(release: ModuleType) -> None:
    version = release.checked_version(DEPLOY.parent)
    assert version.startswith("0.1.0")

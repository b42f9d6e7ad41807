"""What can be known of dependencies without a network: licences, bounds, kinds."""

from __future__ import annotations

import re
from importlib.metadata import PackageMetadata, distribution

import pytest
from packaging.requirements import Requirement
from tests.support.dependencies import installed, required

# Licences under which what users install may come; none asks more than to be named, or, for the
# MPL's, to publish changes to its own files.
ALLOWED = re.compile(
    r"(Apache|BSD|MIT|ISC|PSF|Python Software|MPL|Mozilla|CNRI|0BSD|Zlib|CC0|BSL|LLVM|Unlicense)",
)
REFUSED = re.compile(r"\bA?GPL|Affero|Commercial|Proprietary")


def licence(name: str) -> str:
    """What a distribution says of its licence, wherever it does."""
    metadata = distribution(name).metadata
    said = [text[:100] for key in ("License-Expression", "License") for text in _all(metadata, key)]
    said += [text for text in _all(metadata, "Classifier") if text.startswith("License")]
    return " ".join(said)


def _all(metadata: PackageMetadata, key: str) -> list[str]:
    return metadata.get_all(key) or []


@pytest.mark.parametrize("name", sorted(installed()))
def test_every_dependency_has_a_permissive_licence(name: str) -> None:
    said = licence(name)
    assert ALLOWED.search(said), f"{name}: {said!r}"
    assert not REFUSED.search(said), f"{name}: {said!r}"


@pytest.mark.parametrize("requirement", required(), ids=str)
def test_every_requirement_has_a_floor_and_comes_from_the_index(requirement: Requirement) -> None:
    assert requirement.url is None
    assert any(part.operator == ">=" for part in requirement.specifier)

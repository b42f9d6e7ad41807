"""Check the licences and version bounds of the dependencies, without a network."""

from __future__ import annotations

import re
from importlib.metadata import PackageMetadata, distribution

from tests.support.dependencies import installed, required

# Licences that dependencies may have. They require attribution at most; the MPL also requires that
# changes to its own files are published.
ALLOWED = re.compile(
    r"(Apache|BSD|MIT|ISC|PSF|Python Software|MPL|Mozilla|CNRI|0BSD|Zlib|CC0|BSL|LLVM|Unlicense)",
)
REFUSED = re.compile(r"\bA?GPL|Affero|Commercial|Proprietary")


def licence(name: str) -> str:
    """Return the licence texts of every metadata field that may have one."""
    metadata = distribution(name).metadata
    said = [text[:100] for key in ("License-Expression", "License") for text in _all(metadata, key)]
    said += [text for text in _all(metadata, "Classifier") if text.startswith("License")]
    return " ".join(said)


def _all(metadata: PackageMetadata, key: str) -> list[str]:
    return metadata.get_all(key) or []


def test_every_dependency_has_a_permissive_licence() -> None:
    licences = {name: licence(name) for name in installed()}
    assert licences
    refused = {
        name: said
        for name, said in licences.items()
        if not ALLOWED.search(said) or REFUSED.search(said)
    }
    assert refused == {}


def test_every_requirement_has_a_lower_bound_and_no_url() -> None:
    requirements = required()
    assert requirements
    wrong = [
        str(requirement)
        for requirement in requirements
        if requirement.url is not None
        or all(part.operator != ">=" for part in requirement.specifier)
    ]
    assert wrong == []

"""The lock file has every dependency of the server, in versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tests.deploy import image
from tests.deploy.manifests import DEPLOY
from tests.support.dependencies import PYPROJECT

LOCK = DEPLOY / "requirements.lock"
PYTHONS = ("3.11.0", "3.12.0", "3.13.0")
NONE = Version("0")


def locked(python: str) -> dict[str, Version]:
    """Return the locked version of each package for a Python version on Linux."""
    variables = {"sys_platform": "linux", "platform_machine": "x86_64"}
    variables |= {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    versions: dict[str, Version] = {}
    for line in re.sub(r" *\\\n +--hash=\S+", "", LOCK.read_text()).splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(variables):
                (pin,) = requirement.specifier
                assert pin.operator == "=="
                assert requirement.name not in versions
                versions[requirement.name] = Version(pin.version)
    return versions


def wanted() -> list[Requirement]:
    """Return what pyproject.toml requires of the image, except torch."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["server"], *extras["otel"]]
    return [found for found in map(Requirement, lines) if found.name != "torch"]


def test_locked_versions_are_allowed() -> None:
    for python in PYTHONS:
        versions = locked(python)
        refused = [
            str(requirement)
            for requirement in wanted()
            if versions.get(canonicalize_name(requirement.name), NONE) not in requirement.specifier
        ]
        assert refused == [], "run `make lock` and commit the result"


def test_every_dependency_of_a_locked_package_is_locked() -> None:
    """Nothing is resolved when the image is built, because `--no-deps` installs the lock."""
    versions = locked("3.11.0") | {"torch": Version("2")}
    needed = defaultdict(list)
    for name in versions:
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed[canonicalize_name(requirement.name)].append(name)
    assert {name: by for name, by in needed.items() if name not in versions} == {}


def test_every_locked_file_has_a_hash() -> None:
    pins = re.findall(r"^[a-z].*?(?=^[a-z]|\Z)", LOCK.read_text(), re.MULTILINE | re.DOTALL)
    assert len(pins) > 50
    assert [pin for pin in pins if "--hash=sha256:" not in pin] == []


def test_the_image_installs_the_lock_and_an_allowed_torch() -> None:
    runs = [step.rest for step in image.instructions() if step.keyword == "RUN"]
    assert any("--require-hashes --no-deps --requirement requirements.lock" in run for run in runs)
    (pin,) = (step.rest for step in image.instructions() if step.rest.startswith("TORCH="))
    lines = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["server"]
    (torch,) = (found for found in map(Requirement, lines) if found.name == "torch")
    assert pin.removeprefix("TORCH=") in torch.specifier
    assert not {"torch", "triton"} & locked("3.11.0").keys()
    assert not [name for name in locked("3.11.0") if name.startswith(("nvidia-", "cuda-"))]

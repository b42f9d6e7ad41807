"""Clients in three languages run suite.json against the real server, without our Python package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from google.rpc import status_pb2

from januslens.v1 import models_pb2, trace_pb2
from tests.client.scripted import Script, serving

HERE = Path(__file__).parent
PROTOS = HERE.parents[1] / "protos"
SUITE = HERE / "suite.json"
# `google/rpc/*.proto` are installed with googleapis-common-protos.
GOOGLE = Path(status_pb2.__file__).parents[2]
JARS = Path("/usr/share/java")
# Debian's packages of grpc-java; .ci/run installs them.
JAR_NAMES = """
    grpc-api grpc-context grpc-core grpc-netty grpc-protobuf grpc-protobuf-lite grpc-stub gson guava
    netty-buffer netty-codec netty-codec-http netty-codec-http2 netty-common netty-handler
    netty-resolver netty-transport perfmark-api perfmark-impl proto-google-common-protos protobuf
    protobuf-util
""".split()

# Sent by a scripted server. The stream has a gap in its numbers, and no summary.
INCOMPLETE = [
    trace_pb2.TraceResponse(header=trace_pb2.TraceHeader(request_id="1")),
    trace_pb2.TraceResponse(sequence=2, layer=trace_pb2.LayerGraph(layer=1)),
]
MODELS = models_pb2.ListModelsResponse(models=[models_pb2.Model(name="demo", n_layers=4)])
NUMBER, TEXT, LIST = "messages.0.models.0.n_layers", "messages.0.models.0.name", "messages.0.models"
WRONG = {
    "another text": {TEXT: "other"},
    "another number": {NUMBER: 5},
    "another list": {f"{LIST}.*.n_layers": [4, 4]},
    "another member": {f"{LIST}.*.name": {"includes": "other"}},
    "another count": {LIST: {"count": 2}},
    "another pattern": {TEXT: {"matches": "^x"}},
    "not absent": {TEXT: {"absent": True}},
    "not there": {f"{LIST}.1.name": {"matches": "."}},
    "not near": {NUMBER: {"near": 4.5, "within": 0.4}},
    "too small": {NUMBER: {"at_least": 4.5}},
}


def protoc(*arguments: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"-I{GOOGLE}"]
    subprocess.run([*command, *arguments], check=True)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The Python client, with stubs that the current protoc generates."""
    stubs = tmp_path_factory.mktemp("stubs")
    files = [str(path.relative_to(PROTOS)) for path in PROTOS.glob("januslens/v1/*.proto")]
    protoc(f"--python_out={stubs}", f"--grpc_python_out={stubs}", *files)
    (stubs / "januslens" / "__init__.py").touch()  # found before the installed package
    return ["env", f"PYTHONPATH={stubs}", sys.executable, str(HERE / "client.py")]


@pytest.fixture(scope="module")
def node() -> list[str]:
    """The Node client, which reads the .proto files itself."""
    found = shutil.which("node")
    if found is None or not (HERE / "node_modules").exists():
        pytest.skip(f"needs Node and `npm ci --prefix {HERE.relative_to(HERE.parents[1])}`")
    return [found, str(HERE / "client.mjs")]


@pytest.fixture(scope="module")
def java() -> list[str]:
    """The Java client, compiled at its start."""
    found = shutil.which("java")
    jars = [JARS / f"{name}.jar" for name in JAR_NAMES]
    missing = [jar.stem for jar in jars if not jar.exists()]
    if found is None or missing:
        pytest.skip(f"needs Java 17 and Debian's grpc-java; missing: {missing or 'java'}")
    # One compiler and one collector thread: the program is short.
    options = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
    return [found, *options, "-cp", os.pathsep.join(map(str, jars)), str(HERE / "Conformance.java")]


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contract as protoc describes it, with the types of error details."""
    path = tmp_path_factory.mktemp("descriptors") / "contract.bin"
    files = ("januslens/v1/service.proto", "google/rpc/error_details.proto")
    protoc("--include_imports", f"--descriptor_set_out={path}", *files)
    return path


@pytest.fixture(params=["python", "node", "java"])
def client(request: pytest.FixtureRequest, descriptors: Path) -> tuple[list[str], Sequence[Path]]:
    """The command of a client, and its arguments after address and table."""
    command: list[str] = request.getfixturevalue(request.param)
    contract = {"python": (), "node": (PROTOS, GOOGLE), "java": (descriptors,)}
    return command, contract[request.param]


def run(
    client: tuple[list[str], Sequence[Path]], address: str, table: Path
) -> subprocess.CompletedProcess[str]:
    command, contract = client
    return subprocess.run(
        [*command, address, str(table), *map(str, contract)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_client_passes_the_suite(
    client: tuple[list[str], Sequence[Path]], server_address: str
) -> None:
    checks = json.loads(SUITE.read_text())["checks"]
    done = run(client, server_address, SUITE)
    assert done.stdout == f"{len(checks)} passed, 0 failed\n", done.stdout + done.stderr
    assert done.returncode == 0


def test_every_client_reports_what_differs(
    client: tuple[list[str], Sequence[Path]], tmp_path: Path
) -> None:
    listed = {"rpc": "ListModels", "request": {}}
    checks = [{"name": name, **listed, "expect": expect} for name, expect in WRONG.items()]
    checks += [
        {"name": "an incomplete stream", "rpc": "Trace", "request": {}},
        {"name": "another status", **listed, "status": "NOT_FOUND"},
        {"name": "no such RPC", "rpc": "GetServerInfo", "request": {}},
    ]
    table = tmp_path / "wrong.json"
    table.write_text(json.dumps({"checks": checks}))
    with serving(Script(responses=INCOMPLETE, pages=[MODELS])) as address:
        done = run(client, address, table)
    *lines, last = done.stdout.splitlines()
    assert last == f"0 passed, {len(checks)} failed", done.stdout + done.stderr
    assert done.returncode == 1
    stream = "an incomplete stream: message 1"
    assert [line for line in lines if line.startswith(stream)] == [
        f"{stream} has sequence 2",
        f"{stream}: expected a summary in the last message only",
    ]
    assert {line.partition(":")[0] for line in lines} == {check["name"] for check in checks}


def test_the_suite_asks_every_rpc() -> None:
    from januslens.v1 import service_pb2

    service = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
    checks = json.loads(SUITE.read_text())["checks"]
    assert {check["rpc"] for check in checks} == {method.name for method in service.methods}
    names = [check["name"] for check in checks]
    assert len(names) == len(set(names))

"""Models that are loaded and unloaded while the server runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

import januslens
from januslens.cli.program import januslens as command
from januslens_server.access.callers import token_hash
from tests.architectures.cases import CASES
from tests.loading.folders import saved
from tests.support.calls import long_trace, started
from tests.support.metrics import page, sample
from tests.support.model_folders import healthy, with_nan
from tests.support.server import ServerProcess, running_server

TINY = next(case for case in CASES if case.id == "gpt2-plain")
SERVING = health_pb2.HealthCheckResponse.SERVING
TOKENS = {"root": "token of root", "ada": "token of ada", "one": "token of one"}


@dataclass
class Site:
    """A server with the demo, and a folder of models that it may load."""

    server: ServerProcess
    folder: Path

    def client(self, caller: str = "root") -> januslens.Client:
        return januslens.Client(self.server.address, token=TOKENS[caller], timeout=60)

    def loaded(self, client: januslens.Client, name: str, source: Path) -> januslens.Model:
        """Load a model and wait until it is READY or FAILED."""
        model = client.load_model(name, str(source))
        deadline = time.monotonic() + 60
        while model.state == "LOADING":
            assert time.monotonic() < deadline
            time.sleep(0.05)
            model = client.model(name)
        return model

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run `januslens admin` in this process; return its exit status and output."""
        flags = ["--server", self.server.address, "--token", TOKENS["root"]]
        found = CliRunner().invoke(command, ["admin", *arguments, *flags])
        return found.exit_code, found.output


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("loadable")
    saved(TINY, folder / "tiny")
    with_nan(folder / "broken")
    healthy(folder / "copy")
    (folder / "link").symlink_to("/etc")
    (folder / "loop").symlink_to(folder / "loop")
    permissions: dict[str, dict[str, Any]] = {
        "root": {"admin": True},
        "ada": {},
        "one": {"admin": True, "models": ["one"]},
    }
    callers = tmp_path_factory.mktemp("callers") / "callers.yaml"
    entries = [
        {"name": name, "tokens": [{"sha256": token_hash(TOKENS[name]).hex()}], **fields}
        for name, fields in permissions.items()
    ]
    callers.write_text(yaml.safe_dump({"callers": entries}))
    flags = ["--callers", str(callers), "--loadable", str(folder), "--loadable", "org/*"]
    with running_server(*flags) as server:
        yield Site(server, folder)


def serving(site: Site, service: str) -> Any:
    with grpc.insecure_channel(site.server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return stub.Check(request, timeout=20).status


def test_a_loaded_model_is_served_until_it_is_unloaded(site: Site) -> None:
    with site.client() as client:
        model = site.loaded(client, "tiny", site.folder / "tiny")
        assert (model.state, model.loaded_fraction) == ("READY", 1.0)
        assert [found.name for found in client.list_models()] == ["demo", "tiny"]
        assert client.trace([1, 2, 3], model="tiny").layers
        assert serving(site, "tiny") == serving(site, "januslens.all-ready") == SERVING
        labels = {"model": "tiny", "state": "READY"}
        assert sample(site.server, "januslens_model_state", **labels) == 1
        assert client.load_model("tiny", str(site.folder / "tiny")).state == "READY"
        client.unload_model("tiny")
        with pytest.raises(januslens.errors.ModelNotFound):
            client.trace([1, 2, 3], model="tiny")
        with pytest.raises(januslens.errors.ModelNotFound):
            client.unload_model("tiny")
        assert [found.name for found in client.list_models()] == ["demo"]
        assert sample(site.server, "januslens_model_state", **labels) == 0
        with pytest.raises(grpc.RpcError) as unknown:
            serving(site, "tiny")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_unloaded_models_leave_no_metric_series(site: Site) -> None:
    counts = set()
    with site.client() as client:
        for i in range(3):
            site.loaded(client, f"tiny-{i}", site.folder / "tiny")
            assert client.trace([1, 2, 3], model=f"tiny-{i}").layers
            assert sample(site.server, "januslens_tokens_total", model=f"tiny-{i}") >= 3
            client.unload_model(f"tiny-{i}")
            samples = [found for family in page(site.server) for found in family.samples]
            assert f"tiny-{i}" not in {found.labels.get("model") for found in samples}
            counts.add(len(samples))
    assert len(counts) == 1


def test_only_callers_with_the_scope_change_models(site: Site) -> None:
    source = str(site.folder / "tiny")
    with site.client("ada") as client:
        with pytest.raises(januslens.errors.PermissionDenied, match="'admin: true'"):
            client.load_model("tiny", source)
        with pytest.raises(januslens.errors.PermissionDenied, match="may not call UnloadModel"):
            client.unload_model("demo")
        assert "LoadModel" not in client.server_info().rpcs
    with site.client("one") as client:
        with pytest.raises(januslens.errors.PermissionDenied, match="not permitted"):
            client.load_model("other", source)
        with pytest.raises(januslens.errors.PermissionDenied, match="not permitted"):
            client.unload_model("demo")
        assert "LoadModel" in client.server_info().rpcs


@pytest.mark.parametrize(
    "source",
    [
        "/etc",
        "{folder}/../x",
        "{folder}/link",
        "{folder}/loop",
        "{folder}/link/passwd",
        "relative",
        "other/name",
        "org/..",
        "org/name/../../etc",
        "../org/name",
    ],
)
def test_sources_that_the_operator_does_not_list_are_denied(site: Site, source: str) -> None:
    with site.client() as client:
        with pytest.raises(januslens.errors.PermissionDenied, match="is not allowed; expected"):
            client.load_model("other", source.format(folder=site.folder))
        assert [found.name for found in client.list_models()] == ["demo"]


def test_a_name_belongs_to_one_source_and_is_checked(site: Site) -> None:
    with site.client() as client:
        with pytest.raises(januslens.errors.ModelExists, match="'demo' is in use; unload"):
            client.load_model("demo", str(site.folder / "tiny"))
        for name in ("", "a b", "x" * 65, "x\n", "\x1b[31m", "../x", "x" * 3 * 2**20):
            with pytest.raises(januslens.errors.InvalidRequest) as refused:
                client.load_model(name, str(site.folder / "tiny"))
            assert [found.field for found in refused.value.field_violations] == ["model"]
        for source in ("", "/x" * 2049, f"{site.folder}/\0", f"{site.folder}/a\nb"):
            with pytest.raises(januslens.errors.InvalidRequest) as refused:
                client.load_model("tiny", source)
            assert [found.field for found in refused.value.field_violations] == ["source"]
        for revision in ("/dev/zero", "../../x", "a/../b", "a//b", "a\0", "x" * 300):
            with pytest.raises(januslens.errors.InvalidRequest) as refused:
                client.load_model("tiny", "org/name", revision=revision)
            assert [found.field for found in refused.value.field_violations] == ["revision"]
    assert "internal error" not in site.server.log


def test_a_broken_model_fails_and_another_takes_its_name(site: Site) -> None:
    with site.client() as client:
        model = site.loaded(client, "name", site.folder / "broken")
        assert model.state == "FAILED"
        assert "infinite or NaN" in model.state_reason
        assert client.tokenize("Japan")  # the demo, the only model that serves
        assert serving(site, "januslens.ready") == SERVING
        assert site.loaded(client, "name", site.folder / "tiny").ready
        client.unload_model("name")


def test_unloading_waits_for_running_requests(site: Site) -> None:
    token = (("authorization", f"Bearer {TOKENS['root']}"),)
    with site.client() as client, grpc.insecure_channel(site.server.address) as channel:
        assert site.loaded(client, "copy", site.folder / "copy").ready
        request = long_trace(4)
        request.model = "copy"
        running = started(channel, "Trace", request, metadata=token, timeout=60)
        assert next(running).HasField("header")  # not read further: the stream stays open
        unloading = threading.Thread(target=client.unload_model, args=("copy",))
        unloading.start()
        deadline = time.monotonic() + 20
        while client.model("copy").state != "UNLOADING":
            assert time.monotonic() < deadline
        with pytest.raises(januslens.errors.ModelNotFound, match="is being unloaded"):
            client.tokenize("Japan", model="copy")
        assert unloading.is_alive()
        assert list(running)[-1].HasField("summary")
        unloading.join(20)
        assert not unloading.is_alive()


def test_the_command_loads_and_unloads(site: Site) -> None:
    status, output = site.run("load", "tiny", str(site.folder / "tiny"))
    assert status == 0
    assert output.endswith("tiny READY: GPT2LMHeadModel, float32 on cpu\n")
    assert site.run("unload", "tiny") == (0, "tiny unloaded\n")
    status, output = site.run("load", "broken", str(site.folder / "broken"))
    assert status == 1
    assert "model 'broken' FAILED: " in output
    assert site.run("unload", "broken")[0] == 0


def test_the_command_names_the_option_of_a_missing_token(site: Site) -> None:
    found = CliRunner().invoke(command, ["models", "--server", site.server.address])
    assert found.exit_code == 1
    assert found.output.endswith("set the token with --token or JANUSLENS_TOKEN\n")


def test_without_callers_and_loadable_models_cannot_be_changed(server: ServerProcess) -> None:
    with januslens.Client(server.address, timeout=60) as client:
        with pytest.raises(januslens.errors.PermissionDenied, match="enable it with --loadable"):
            client.unload_model("demo")
        assert client.model("demo").ready

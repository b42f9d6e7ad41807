"""Two processes on one port behave like one server."""

from __future__ import annotations

import os
import re
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import januslens
from januslens.v1 import models_pb2, trace_pb2
from januslens_server.access.callers import token_hash
from tests.integration.test_metrics import documented
from tests.integration.test_starting import ended
from tests.support.calls import REQUEST_ID, long_trace, prompt, refusal, started, timeless
from tests.support.members import PROC, members, served_by, wait_until_gone
from tests.support.memory import resident_bytes
from tests.support.metrics import page, rpc_labels, sample
from tests.support.model_folders import in_float32
from tests.support.server import ServerProcess, running_server

TOKEN = "a token of this test alone"  # noqa: S105 - used by this test only
TOKENIZE = models_pb2.TokenizeRequest(text="Japan")
TRACE = trace_pb2.TraceRequest(model="demo", input=prompt("The capital of Japan is"))
OK, SPENT = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Pair:
    """A server of two processes, and its callers' file."""

    server: ServerProcess
    callers: Path

    def connection(self) -> grpc.Channel:
        """A new channel with its own connection."""
        return grpc.insecure_channel(self.server.address, [("grpc.use_local_subchannel_pool", 1)])

    def client(self) -> januslens.Client:
        return januslens.Client(self.server.address, token=TOKEN, timeout=60)

    def call(self, channel: grpc.Channel, method: str, request: Any, request_id: str = "") -> Any:
        metadata = [("authorization", f"Bearer {TOKEN}")]
        metadata += [(REQUEST_ID, request_id)] if request_id else []
        return started(channel, method, request, metadata=metadata, timeout=30)


def granting(**fields: Any) -> str:
    entry = {"name": "ada", "tokens": [{"sha256": token_hash(TOKEN).hex()}], **fields}
    return yaml.safe_dump({"callers": [entry]})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    callers, model = folder / "callers.yaml", in_float32(folder / "demo")
    callers.write_text(granting())
    flags = ["--processes", "2", "--health-port", "0", "--callers", str(callers)]
    flags += ["--loadable", str(folder)]
    with running_server(*flags, "--model", f"demo={model}") as server:
        yield Pair(server, callers)


def test_connections_are_distributed_and_answers_are_equal_bytes(pair: Pair) -> None:
    answers: dict[int, list[bytes]] = {}
    served = Counter[int]()
    while served.total() < 8 or len(served) < 2:
        request_id = f"spread-{served.total()}"
        with pair.connection() as channel:
            answer = [timeless(m) for m in pair.call(channel, "Trace", TRACE, request_id)]
        process = served_by(pair.server, request_id)
        served[process] += 1
        assert answers.setdefault(process, answer) == answer
        assert served.total() < 50
    assert answers[1] == answers[2]


def test_a_connection_stays_with_one_process(pair: Pair) -> None:
    with pair.connection() as channel:
        for number in range(6):
            pair.call(channel, "Tokenize", TOKENIZE, f"stays-{number}").result()
    assert len({served_by(pair.server, f"stays-{number}") for number in range(6)}) == 1


def test_one_page_counts_the_calls_of_both(pair: Pair) -> None:
    labels = rpc_labels("Tokenize") | {"grpc_code": "OK"}
    before = sample(pair.server, "grpc_server_handled_total", **labels)
    served = set()
    for number in range(12):
        with pair.connection() as channel:
            pair.call(channel, "Tokenize", TOKENIZE, f"counted-{number}").result()
        served.add(served_by(pair.server, f"counted-{number}"))
    assert served == {1, 2}
    assert sample(pair.server, "grpc_server_handled_total", **labels) == before + 12


def test_the_page_has_exactly_the_documented_metrics(pair: Pair) -> None:
    families = page(pair.server)
    # A metric without samples is not in the files of the processes, and this server has no TLS.
    without_samples = {"januslens_certificate_expiry_timestamp_seconds"}
    assert {family.name for family in families} == documented() - without_samples
    labels = {name for family in families for s in family.samples for name in s.labels}
    assert "pid" not in labels


def test_gauges_cover_both_processes(pair: Pair) -> None:
    assert sample(pair.server, "januslens_ready") == 1
    states = {
        state: sample(pair.server, "januslens_model_state", model="demo", state=state)
        for state in ("LOADING", "READY", "FAILED", "UNLOADING")
    }
    assert states == {"LOADING": 0, "READY": 1, "FAILED": 0, "UNLOADING": 0}
    resident = [resident_bytes(process) for process in members(pair.server)]
    allocated, total = (
        sample(pair.server, "januslens_device_memory_bytes", device="cpu", kind=kind)
        for kind in ("allocated", "total")
    )
    assert allocated == pytest.approx(sum(resident), rel=0.05)
    assert max(resident) < total < machine_bytes() + 1


def machine_bytes() -> int:
    return status_kb(PROC / "meminfo", "MemTotal") * 1024


def status_kb(path: Path, entry: str) -> int:
    found = re.search(rf"^{entry}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def test_weights_are_shared_pages_of_their_file(pair: Pair) -> None:
    """Weights served in the data type of their file are mapped, so processes share their pages."""
    for process in members(pair.server):
        smaps = (PROC / str(process) / "smaps").read_text()
        mapping = re.search(r"^\S+ \S+ .*/model\.safetensors\n(?:\w+:.*\n)+", smaps, re.MULTILINE)
        assert mapping
        size, dirty = (
            re.search(rf"^{entry}:\s+(\d+) kB", mapping[0], re.MULTILINE)
            for entry in ("Rss", "Private_Dirty")
        )
        assert size
        assert dirty
        assert int(size[1]) > 3_000
        assert int(dirty[1]) == 0


def test_the_health_port_answers_for_both(pair: Pair) -> None:
    assert health(pair, "", "januslens.ready", "demo") == [SERVING] * 3


def health(pair: Pair, *services: str) -> list[int]:
    with grpc.insecure_channel(pair.server.health_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        requests = (health_pb2.HealthCheckRequest(service=service) for service in services)
        return [stub.Check(request, timeout=20).status for request in requests]


def test_another_server_on_the_port_is_refused(pair: Pair) -> None:
    """Also a server with several processes, which sets SO_REUSEPORT."""
    port = pair.server.address.rpartition(":")[2]
    status, (line,) = ended("--port", port, "--metrics-port", "0", "--processes", "2")
    assert status == 1
    assert line.startswith("januslens-server: cannot serve: Address already in use")
    assert port in line


def test_quotas_apply_to_each_process(pair: Pair) -> None:
    pair.callers.write_text(granting(quotas={"requests_per_minute": 2}))
    reload(pair)
    spent: set[int] = set()
    while spent != {1, 2}:
        with pair.connection() as channel:
            ids = [f"quota-{len(spent)}-{uuid.uuid4().hex}" for _ in range(3)]
            calls = [pair.call(channel, "Tokenize", TOKENIZE, request_id) for request_id in ids]
            codes = [call.code() for call in calls]
            process = served_by(pair.server, ids[0])
        if process in spent:
            assert Counter(codes) == {SPENT: 3}
        else:
            assert Counter(codes) == {OK: 2, SPENT: 1}
        spent.add(process)


def reload(pair: Pair) -> None:
    """Let both processes reload the callers, and wait until they have."""
    seen, deadline = len(pair.server.lines), time.monotonic() + 10
    pair.server.process.send_signal(signal.SIGHUP)
    replaced = re.compile(r"callers reloaded: 1 from .* process=(\d)")
    while set(replaced.findall("\n".join(pair.server.lines[seen:]))) != {"1", "2"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sighup_reaches_both(pair: Pair) -> None:
    pair.callers.write_text(granting(rpcs=["Trace"]))
    reload(pair)
    with pair.connection() as channel:
        call = pair.call(channel, "Tokenize", TOKENIZE)
        with pytest.raises(grpc.RpcError):
            call.result()
        assert refusal(call).reason == "PERMISSION_DENIED"


def found_in_both(pair: Pair, model: str) -> set[str]:
    """Return the states of a model in the processes; `NONE` where there is none."""
    states: dict[int, str] = {}
    while len(states) < 2:
        request_id = uuid.uuid4().hex
        with pair.connection() as channel:
            listed = pair.call(channel, "ListModels", models_pb2.ListModelsRequest(), request_id)
            found = {m.name: m.State.Name(m.state) for m in listed.result().models}
        states[served_by(pair.server, request_id)] = found.get(model, "NONE")
    return set(states.values())


def wait_for_both(pair: Pair, model: str, state: str) -> None:
    deadline = time.monotonic() + 60
    while found_in_both(pair, model) != {state}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_models_are_loaded_in_both(pair: Pair) -> None:
    pair.callers.write_text(granting(admin=True))
    reload(pair)
    folder, broken = (pair.callers.parent / name for name in ("demo", "broken"))
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pair.client() as client:
        client.load_model("copy", str(broken))
        wait_for_both(pair, "copy", "STATE_FAILED")
        # A model that does not serve can be loaded from elsewhere.
        assert client.load_model("copy", str(folder)).state == "LOADING"
    assert "NONE" not in found_in_both(pair, "copy")
    assert health(pair, "januslens.ready") == [SERVING]
    fractions = []
    while (model := seen_once(pair, "copy")).state == "LOADING":
        fractions.append(model.loaded_fraction)
    # Whichever process is asked, its answer is that of the slowest one.
    assert fractions == sorted(fractions)
    assert model.state == "READY"
    assert found_in_both(pair, "copy") == {"STATE_READY"}
    assert health(pair, "copy") == [SERVING]


def seen_once(pair: Pair, model: str) -> januslens.Model:
    """Return a model as one of the processes reports it."""
    with pair.client() as client:
        return client.model(model)


def test_a_model_that_one_process_cannot_load_fails_in_both(pair: Pair) -> None:
    folder = in_float32(pair.callers.parent / "half")
    with pair.client() as client:
        client.load_model("half", str(folder))
        while client.model("half").loaded_fraction < 0.5:  # until process 1 has read the weights
            time.sleep(0.01)
    (folder / "model.safetensors").unlink()
    while (model := seen_once(pair, "half")).state == "LOADING":
        time.sleep(0.05)
    assert "process 2 could not load it" in model.state_reason
    wait_for_both(pair, "half", "STATE_FAILED")
    assert health(pair, "half") == [NOT_SERVING]


def test_a_killed_process_is_replaced_and_its_counts_stay(pair: Pair) -> None:
    labels = rpc_labels("Trace") | {"grpc_code": "OK"}
    before = sample(pair.server, "grpc_server_handled_total", **labels)
    killed, other = members(pair.server)
    os.kill(killed, signal.SIGKILL)
    pair.server.wait_for("process 1 ended with status 137; restarting it in 1 s")
    for number in range(4):  # nothing waits for it
        with pair.connection() as channel:
            list(pair.call(channel, "Trace", TRACE, f"meanwhile-{number}"))
        assert served_by(pair.server, f"meanwhile-{number}") == 2
    assert health(pair, "januslens.ready", "demo") == [SERVING] * 2
    resident = sample(pair.server, "januslens_device_memory_bytes", device="cpu", kind="allocated")
    assert resident == pytest.approx(resident_bytes(other), rel=0.05)
    pair.server.wait_for("process 1 serves again")
    assert len(members(pair.server)) == 2
    assert sample(pair.server, "grpc_server_handled_total", **labels) == before + 4


def test_a_replacement_has_the_changed_models_and_unloading_ends_in_both(pair: Pair) -> None:
    assert found_in_both(pair, "copy") == {"STATE_READY"}
    assert found_in_both(pair, "half") == {"STATE_FAILED"}
    with pair.client() as client:
        client.unload_model("half")
        assert "copy" in models_of_metrics(pair.server)
        client.unload_model("copy")
    assert found_in_both(pair, "copy") == {"NONE"}
    assert models_of_metrics(pair.server) == {None, "demo"}


def models_of_metrics(server: ServerProcess) -> set[str | None]:
    """Names of the models that the metrics page has series of."""
    return {found.labels.get("model") for family in page(server) for found in family.samples}


def test_sigterm_drains_both(pair: Pair) -> None:
    """This test is the last one of the module: it ends the server."""
    processes = members(pair.server)
    with pair.connection() as one, pair.connection() as other:
        streams = [pair.call(channel, "Trace", long_trace(2)) for channel in (one, other)]
        for stream in streams:
            assert next(stream).HasField("header")
        pair.server.process.terminate()
        for stream in streams:
            assert list(stream)[-1].HasField("summary")
    assert pair.server.process.wait(timeout=20) == 0
    wait_until_gone(processes, 1)
    for number in (1, 2):
        assert re.search(rf"drained process={number}$", pair.server.log, re.MULTILINE)
    assert "Traceback" not in pair.server.log

"""Spans of calls are exported to a collector if the environment names one."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from januslens.v1 import (
    activations_pb2,
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    intervene_pb2,
    interventions_pb2,
    models_pb2,
    sites_pb2,
    trace_pb2,
)
from tests.support.calls import prompt, refused, started
from tests.support.server import running_server

PROMPT = prompt("The capital of Japan is")
ZERO = interventions_pb2.Intervention(site=sites_pb2.SITE_MLP_OUTPUT, layers=[1], zero=True)
EXPERIMENT = intervene_pb2.Experiment(interventions=[ZERO])
OTHERS: dict[str, Any] = {
    "Activations": activations_pb2.ActivationsRequest(
        input=PROMPT, sites=[sites_pb2.SITE_BLOCK_OUTPUT]
    ),
    "Intervene": intervene_pb2.InterveneRequest(input=PROMPT, experiments=[EXPERIMENT] * 2),
    "Generate": generation_pb2.GenerateRequest(input=PROMPT, max_new_tokens=2),
}
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector that keeps the spans."""

    def __init__(self) -> None:
        self.spans: queue.SimpleQueue[tuple[str, Span]] = queue.SimpleQueue()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - gRPC's
        for resource in request.resource_spans:
            named = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put((named["service.name"], span))
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Collector, dict[str, str]]]:
    """A collector on loopback, and the environment that selects it."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server  # untyped
    add(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    yield collector, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    server.stop(0).wait()


def attributes(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


def test_calls_are_children_of_the_callers_spans() -> None:
    with (
        collecting() as (collector, environment),
        running_server(environment=environment) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        request = trace_pb2.TraceRequest(input=prompt("The capital of Japan is"), layers=[0])
        parent = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")
        list(started(channel, "Trace", request, metadata=(parent,), timeout=60))
        service, span = collector.spans.get(timeout=30)
        assert service == "januslens"
        assert span.name == "januslens.v1.IntrospectionService/Trace"
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
        assert span.kind == Span.SPAN_KIND_SERVER
        facts = attributes(span)
        assert facts["rpc.grpc.status_code"] == 0
        assert facts["januslens.model"] == "demo"
        seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert 0 < facts["januslens.stages.forward"] < facts["januslens.device_seconds"] < seconds
        assert not any("Japan" in str(value) for value in facts.values())
        assert f"trace_id={TRACE_ID}" in server.log

        refused(channel, "Tokenize", models_pb2.TokenizeRequest(model="nobody", text="x"))
        _, span = collector.spans.get(timeout=30)
        assert attributes(span)["januslens.reason"] == "MODEL_NOT_FOUND"
        assert span.status.code == Status.STATUS_CODE_UNSET  # a fault of the caller

        for method, sent in OTHERS.items():
            assert list(started(channel, method, sent, timeout=60))
            _, span = collector.spans.get(timeout=30)
            assert span.name == f"januslens.v1.IntrospectionService/{method}"
            facts = attributes(span)
            assert (facts["rpc.grpc.status_code"], facts["januslens.model"]) == (0, "demo")
            assert 0 < facts["januslens.stages.tokenize"] < facts["januslens.seconds"]
        admin: Any = admin_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            admin.LoadModel(admin_pb2.LoadModelRequest(model="x", source="/x"), timeout=60)
        _, span = collector.spans.get(timeout=30)
        assert span.name == "januslens.v1.AdminService/LoadModel"
        assert attributes(span)["januslens.reason"] == "PERMISSION_DENIED"

        started(channel, "ListModels", models_pb2.ListModelsRequest()).result()
        server.process.terminate()
        assert server.process.wait(timeout=30) == 0
        _, span = collector.spans.get(timeout=1)  # sent before the process ended
        assert span.name.endswith("/ListModels")
        (usage,) = (line for line in server.lines if "rpc.usage: usage" in line)
        assert "caller=(others)" in usage
        assert "requests=7" in usage
        assert "experiments=2" in usage
        assert "Intervene/demo/PARTS:requests:1," in usage


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys, januslens_server.__main__, januslens_server.serving.assembly\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=without_endpoints())


def test_an_endpoint_without_the_extra_ends_the_server_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('not installed')\n")
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "januslens_server", "--port", "0", "--metrics-port", "0"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'januslens[otel]'")


def without_endpoints() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}

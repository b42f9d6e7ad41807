"""The metrics page has the documented names, and values that match the requests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import Metric

from januslens.v1 import gradient_lens_pb2, models_pb2, trace_pb2
from tests.support.calls import methods, prompt, refused, started
from tests.support.metrics import SERVICE, page, rpc_labels, sample, wait_until_idle
from tests.support.server import ServerProcess

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
TRACE = trace_pb2.TraceRequest(input=prompt("The capital of Japan is"), layers=[0, 1])
# Kinds of nodes that do not depend on the prompt, and may be cached from an earlier trace.
WEIGHT_ROWS = {
    trace_pb2.NODE_KIND_ATTENTION_NEURON,
    trace_pb2.NODE_KIND_ATTENTION_BIAS,
    trace_pb2.NODE_KIND_MLP_KEY,
    trace_pb2.NODE_KIND_MLP_VALUE,
    trace_pb2.NODE_KIND_MLP_BIAS,
}


def documented() -> set[str]:
    """The metric names in docs/operations.md, without the suffix of counters."""
    names = re.findall(
        r"^\| `((?:grpc_server|januslens)_\w+)`", OPERATIONS.read_text(), re.MULTILINE
    )
    return {name.removesuffix("_total") for name in names}


def trace(channel: grpc.Channel) -> list[trace_pb2.TraceResponse]:
    return list(started(channel, "Trace", TRACE))


class Growth:
    """Increase of each sample since the start."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._before = _samples(page(server))

    def of(self, name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return _samples(page(self._server)).get(key, 0.0) - self._before.get(key, 0.0)


def _samples(families: list[Metric]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (found.name, frozenset(found.labels.items())): float(found.value)
        for family in families
        for found in family.samples
    }


@pytest.fixture
def growth(server: ServerProcess) -> Growth:
    wait_until_idle(server)
    return Growth(server)


def test_the_page_has_exactly_the_documented_metrics(server: ServerProcess) -> None:
    ours = {f.name for f in page(server) if f.name.startswith(("grpc_server_", "januslens_"))}
    assert ours == documented()


def test_series_start_at_0_for_every_method_and_code(server: ServerProcess) -> None:
    """A rate misses the step from an absent series to 1."""
    (handled,) = (f for f in page(server) if f.name == "grpc_server_handled")
    seen = {(s.labels["grpc_method"], s.labels["grpc_code"]) for s in handled.samples}
    assert seen >= {(method, code.name) for method in methods() for code in grpc.StatusCode}


def test_a_ready_model_has_no_other_state(server: ServerProcess) -> None:
    states = {
        state: sample(server, "januslens_model_state", model="demo", state=state)
        for state in ("LOADING", "READY", "FAILED", "UNLOADING")
    }
    assert states == {"LOADING": 0.0, "READY": 1.0, "FAILED": 0.0, "UNLOADING": 0.0}


def test_refusals_are_counted_by_method_status_and_reason(
    growth: Growth, channel: grpc.Channel
) -> None:
    refused(channel, "Tokenize", models_pb2.TokenizeRequest(model="nobody", text="x"))
    labels = rpc_labels("Tokenize")
    assert growth.of("grpc_server_started_total", **labels) == 1
    assert growth.of("grpc_server_handled_total", **labels, grpc_code="NOT_FOUND") == 1
    assert growth.of("grpc_server_handling_seconds_count", **labels) == 1
    assert growth.of("januslens_rejected_total", reason="MODEL_NOT_FOUND") == 1
    assert growth.of("grpc_server_msg_sent_total", **labels) == 0


def test_a_stream_counts_its_messages_and_bytes(growth: Growth, channel: grpc.Channel) -> None:
    received = trace(channel)
    assert growth.of("grpc_server_msg_sent_total", **rpc_labels("Trace")) == len(received)
    sizes = sum(message.ByteSize() for message in received)
    assert growth.of("januslens_stream_bytes_total", grpc_method="Trace") == sizes
    assert growth.of("januslens_write_stall_seconds_count") == len(received)
    assert growth.of("januslens_first_message_seconds_count", grpc_method="Trace") == 1
    first = growth.of("januslens_first_message_seconds_sum", grpc_method="Trace")
    assert 0 < first <= growth.of("grpc_server_handling_seconds_sum", **rpc_labels("Trace"))


def test_a_unary_answer_counts_one_message(growth: Growth, channel: grpc.Channel) -> None:
    answer = started(channel, "ListModels", models_pb2.ListModelsRequest()).result()
    assert growth.of("grpc_server_msg_sent_total", **rpc_labels("ListModels")) == 1
    sent = growth.of("januslens_stream_bytes_total", grpc_method="ListModels")
    assert sent == answer.ByteSize()


def test_a_trace_counts_its_tokens_and_vectors(growth: Growth, channel: grpc.Channel) -> None:
    header, *layers, _ = trace(channel)
    tokens = len(header.header.prompt_tokens)
    assert growth.of("januslens_tokens_total", model="demo") == tokens
    shown = [n.kind for m in layers for n in m.layer.nodes if n.HasField("projection")]
    # The last residual is projected, too, for the model's own prediction.
    projected = growth.of("januslens_vectors_projected_total")
    of_activations = sum(kind not in WEIGHT_ROWS for kind in shown) + 1
    assert 10 < of_activations <= projected <= len(shown) + 1
    trace(channel)  # uses the same rows of the weights
    assert growth.of("januslens_vectors_projected_total") == projected + of_activations


def test_stage_metrics_match_the_answer(growth: Growth, channel: grpc.Channel) -> None:
    *_, summary = trace(channel)
    for stage in summary.summary.times:
        spent = growth.of("januslens_stage_seconds_sum", rpc="Trace", stage=stage.stage)
        assert spent == pytest.approx(stage.seconds, rel=1e-6)
    on_device = [stage for stage in summary.summary.times if stage.stage != "tokenize"]
    stages = sum(stage.seconds for stage in on_device)
    assert growth.of("januslens_busy_seconds_total") >= stages > 0
    assert growth.of("januslens_queue_seconds_count") == 1


def test_event_loop_lag_is_measured_continuously(server: ServerProcess) -> None:
    samples = sample(server, "januslens_event_loop_lag_seconds_count")
    assert samples > 0


def test_cpu_memory_is_shown_by_kind(server: ServerProcess) -> None:
    kinds = ("allocated", "available", "total")
    allocated, available, total = (
        sample(server, "januslens_device_memory_bytes", device="cpu", kind=kind) for kind in kinds
    )
    resident = sample(server, "process_resident_memory_bytes")
    assert allocated == pytest.approx(resident, rel=0.05)
    assert 0 < available < total
    assert allocated < total


def test_texts_of_callers_never_become_labels(server: ServerProcess, channel: grpc.Channel) -> None:
    """Every new label value creates a permanent series, so callers must not create any."""
    refused(channel, "Tokenize", models_pb2.TokenizeRequest(model="mallory-1", text="mallory-2"))
    request = trace_pb2.TraceRequest(input=prompt("Japan"), layers=[0])
    list(started(channel, "Trace", request, metadata=(("x-request-id", "mallory-3"),)))
    before = _series(server)
    unknown: Any = channel.unary_unary(f"/{SERVICE}/Mallory4")
    with pytest.raises(grpc.RpcError):
        unknown(b"", timeout=10)
    gradient = gradient_lens_pb2.GradientLensRequest(model="mallory-5")
    refused(channel, "GradientLens", gradient)
    assert _series(server) == before
    assert not any("mallory" in str(series).lower() for series in before)


def _series(server: ServerProcess) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return set(_samples(page(server)))

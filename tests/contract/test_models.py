"""Several models on one server: the others are served if one fails."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens.v1 import gradient_lens_pb2, lens_pb2, models_pb2, service_pb2_grpc, trace_pb2
from januslens_server.demo import model_path
from tests.support import model_folders
from tests.support.calls import prompt, refused
from tests.support.server import ServerProcess, running_server

BROKEN = {
    "absent": (model_folders.without_weights, "file 'model.safetensors' is missing"),
    "truncated": (model_folders.truncated, "incomplete metadata"),
    "lacking": (model_folders.lacking_one_weight, "h.2.mlp.c_fc.weight"),
    "nan": (model_folders.with_nan, "transformer.h.2.mlp.c_fc.weight"),
    "pickled": (model_folders.pickled, "file 'model.safetensors' is missing"),
}

Model = models_pb2.Model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    models = {name: make(folder / name) for name, (make, _) in BROKEN.items()}
    models["well"] = model_folders.healthy(folder / "well")
    models["odd"] = model_folders.with_configuration(folder / "odd", activation_function="none")
    flags = [flag for name, path in models.items() for flag in ("--model", f"{name}={path}")]
    with running_server(*flags) as process:
        yield process


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> service_pb2_grpc.IntrospectionServiceStub:
    return service_pb2_grpc.IntrospectionServiceStub(channel)


@pytest.fixture(scope="module")
def models(stub: service_pb2_grpc.IntrospectionServiceStub) -> dict[str, Model]:
    return {m.name: m for m in stub.ListModels(models_pb2.ListModelsRequest()).models}


def test_each_model_is_also_returned_alone(
    stub: service_pb2_grpc.IntrospectionServiceStub, models: dict[str, Model]
) -> None:
    for name, listed in models.items():
        assert stub.GetModel(models_pb2.GetModelRequest(model=name)).model == listed


def requests_for(model: str) -> list[tuple[str, Message]]:
    return [
        ("Tokenize", models_pb2.TokenizeRequest(model=model, text="x")),
        ("Project", lens_pb2.ProjectRequest(model=model)),
        ("Trace", trace_pb2.TraceRequest(model=model, input=prompt("Japan"))),
        ("GradientLens", gradient_lens_pb2.GradientLensRequest(model=model)),
    ]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_with_its_reason(
    channel: grpc.Channel, models: dict[str, Model], name: str
) -> None:
    reason = models[name].state_reason
    assert models[name].state == Model.STATE_FAILED
    assert BROKEN[name][1] in reason
    for method, request in requests_for(name):
        answer = refused(channel, method, request)
        assert answer.code is grpc.StatusCode.FAILED_PRECONDITION
        assert (answer.reason, answer.info.domain) == ("MODEL_FAILED", "januslens")
        assert answer.text == f"model {name!r} cannot be served: {reason}"
        assert answer.retry_after is None


def test_errors_of_transformers_fail_only_their_model(models: dict[str, Model]) -> None:
    assert models["odd"].state == Model.STATE_FAILED
    assert "cannot build the model from config.json" in models["odd"].state_reason


def test_healthy_model_serves_beside_failed_ones(
    stub: service_pb2_grpc.IntrospectionServiceStub, models: dict[str, Model]
) -> None:
    well = models["well"]
    assert (well.state, well.state_reason) == (Model.STATE_READY, "")
    assert all(guarantee.held for guarantee in well.guarantees)
    request = trace_pb2.TraceRequest(model="well", input=prompt("Japan"), layers=[0])
    assert list(stub.Trace(request))[-1].HasField("summary")


def test_health_reports_each_model_separately(
    channel: grpc.Channel, models: dict[str, Model]
) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)

    def serving(service: str) -> bool:
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    assert {name for name in models if serving(name)} == {"well"}
    assert serving("januslens.ready")
    assert serving("")


def test_a_request_without_a_name_uses_the_only_model_that_serves(
    stub: service_pb2_grpc.IntrospectionServiceStub, models: dict[str, Model]
) -> None:
    assert [name for name in models if models[name].state != Model.STATE_FAILED] == ["well"]
    assert stub.Tokenize(models_pb2.TokenizeRequest(text="x")).provenance.model == "well"
    trace = stub.Trace(trace_pb2.TraceRequest(input=prompt("Japan"), layers=[0]))
    assert next(iter(trace)).header.provenance.model == "well"


def test_pages_list_every_model_once_by_name(
    stub: service_pb2_grpc.IntrospectionServiceStub, models: dict[str, Model]
) -> None:
    assert list(models) == sorted([*BROKEN, "well", "odd"])
    for size in range(1, len(models) + 2):
        pages = list(pages_of(stub, size))
        assert [model for page in pages for model in page] == list(models.values())
        assert all(len(page) == size for page in pages[:-1])
        assert pages[-1]


def pages_of(
    stub: service_pb2_grpc.IntrospectionServiceStub, size: int
) -> Iterator[list[models_pb2.Model]]:
    token = ""
    while True:
        page = stub.ListModels(models_pb2.ListModelsRequest(page_size=size, page_token=token))
        yield list(page.models)
        token = page.next_page_token
        if not token:
            return


@pytest.mark.parametrize("token", ["7", "0", "-1", "1 ", "x", "\uff11"])
def test_a_page_token_that_was_not_issued_is_refused(channel: grpc.Channel, token: str) -> None:
    answer = refused(channel, "ListModels", models_pb2.ListModelsRequest(page_token=token))
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.fields == ["page_token"]


def test_the_revision_is_a_hash_of_the_weights(models: dict[str, Model]) -> None:
    """Equal weights have the same revision, whatever the path and the name of the model."""
    weights = (model_path() / model_folders.WEIGHTS).read_bytes()
    expected = sha256(sha256(weights).digest()).hexdigest()
    assert models["well"].provenance.revision == expected

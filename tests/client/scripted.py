"""A gRPC server that sends scripted responses, including ones that the real server never sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from januslens.v1 import admin_pb2, models_pb2, neurons_pb2, trace_pb2

SERVICE = "januslens.v1.IntrospectionService"
ADMIN = "januslens.v1.AdminService"


@dataclass
class Script:
    """Sends `responses`; then ends, or with `hangs` waits until the caller leaves.

    Offers ListModels, FindNeurons and Trace, and to load a model that stays as it is in the first
    page. `called` and `left` are set when a call begins
    and ends.
    """

    responses: Sequence[trace_pb2.TraceResponse] = ()
    hangs: bool = False
    pages: Sequence[models_pb2.ListModelsResponse] = ()
    neuron_pages: Sequence[neurons_pb2.FindNeuronsResponse] = ()
    neuron_requests: list[neurons_pb2.FindNeuronsRequest] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    called: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    def trace(
        self, _request: trace_pb2.TraceRequest, context: grpc.ServicerContext
    ) -> Iterator[trace_pb2.TraceResponse]:
        context.add_callback(self.left.set)
        self._come(context)
        yield from self.responses
        if self.hangs:
            self.left.wait(30)

    def list_models(
        self, request: models_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> models_pb2.ListModelsResponse:
        self._come(context)
        return self.pages[int(request.page_token or 0)]

    def load_model(
        self, _request: admin_pb2.LoadModelRequest, context: grpc.ServicerContext
    ) -> admin_pb2.LoadModelResponse:
        self._come(context)
        return admin_pb2.LoadModelResponse(model=self.pages[0].models[0])

    def get_model(
        self, _request: models_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> models_pb2.GetModelResponse:
        self._come(context)
        return models_pb2.GetModelResponse(model=self.pages[0].models[0])

    def find_neurons(
        self, request: neurons_pb2.FindNeuronsRequest, context: grpc.ServicerContext
    ) -> neurons_pb2.FindNeuronsResponse:
        self._come(context)
        self.neuron_requests.append(request)
        return self.neuron_pages[len(self.neuron_requests) - 1]

    def _come(self, context: grpc.ServicerContext) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        self.called.set()


@contextmanager
def serving(script: Script, address: str = "127.0.0.1:0") -> Iterator[str]:
    """Serve a script, by default on a free port, and yield the address."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Trace": grpc.unary_stream_rpc_method_handler(
            script.trace,
            trace_pb2.TraceRequest.FromString,
            trace_pb2.TraceResponse.SerializeToString,
        ),
        "ListModels": grpc.unary_unary_rpc_method_handler(
            script.list_models,
            models_pb2.ListModelsRequest.FromString,
            models_pb2.ListModelsResponse.SerializeToString,
        ),
        "GetModel": grpc.unary_unary_rpc_method_handler(
            script.get_model,
            models_pb2.GetModelRequest.FromString,
            models_pb2.GetModelResponse.SerializeToString,
        ),
        "FindNeurons": grpc.unary_unary_rpc_method_handler(
            script.find_neurons,
            neurons_pb2.FindNeuronsRequest.FromString,
            neurons_pb2.FindNeuronsResponse.SerializeToString,
        ),
    }
    admin: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "LoadModel": grpc.unary_unary_rpc_method_handler(
            script.load_model,
            admin_pb2.LoadModelRequest.FromString,
            admin_pb2.LoadModelResponse.SerializeToString,
        ),
    }
    server = grpc.server(futures.ThreadPoolExecutor(4))
    offered = ((SERVICE, handlers), (ADMIN, admin))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(name, methods) for name, methods in offered]
    )
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield address.removesuffix(":0") + f":{port}" if address.endswith(":0") else address
    finally:
        script.left.set()
        server.stop(None).wait()

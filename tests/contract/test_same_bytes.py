"""Equal requests return equal bytes, whatever other requests the server has run in between."""

from __future__ import annotations

from januslens.v1 import common_pb2, service_pb2_grpc, trace_pb2
from tests.support.calls import prompt, timeless

Stub = service_pb2_grpc.IntrospectionServiceStub


def test_trace_bytes_do_not_depend_on_earlier_requests(stub: Stub) -> None:
    def request(text: str, **fields: object) -> trace_pb2.TraceRequest:
        return trace_pb2.TraceRequest(input=prompt(text), **fields)  # type: ignore[arg-type]  # of several types

    asked = request("The capital of Hungary is the city of")
    first = [timeless(message) for message in stub.Trace(asked)]
    for other in (
        request("The capital of Hungary is the city of", target=common_pb2.Target(text=" Paris")),
        request("Lionel Messi plays for", all_positions=True),
        request("The capital of Peru is", node_kinds=[trace_pb2.NODE_KIND_MLP_VALUE], layers=[2]),
        request("A", selection=trace_pb2.Selection(top_neurons=0)),
    ):
        list(stub.Trace(other))
        assert [timeless(message) for message in stub.Trace(asked)] == first

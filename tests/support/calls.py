"""Raw calls, as a client in any language makes them, and how the server refused them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from januslens.v1 import common_pb2, service_pb2, service_pb2_grpc, trace_pb2

SERVICE = "/januslens.v1.IntrospectionService/"
REQUEST_ID = "x-request-id"
DEADLINE = 60

Detail = TypeVar("Detail", bound=Message)


def methods() -> dict[str, Any]:
    """The service's methods by name, as their descriptors."""
    service = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
    return {method.name: method for method in service.methods}


@dataclass(frozen=True)
class Refusal:
    """A call that did not end well: status, details by type, and the id in its headers."""

    code: grpc.StatusCode
    text: str
    status: status_pb2.Status
    request_id: str | None

    def detail(self, kind: type[Detail]) -> Detail | None:
        """The status's detail of this kind."""
        for packed in self.status.details:
            found = kind()
            if packed.Unpack(found):
                return found
        return None

    @property
    def reason(self) -> str:
        """The ErrorInfo's reason."""
        reason: str = self.info.reason
        return reason

    @property
    def info(self) -> Any:
        """The ErrorInfo; fails where there is none."""
        info = self.detail(error_details_pb2.ErrorInfo)
        if info is None:
            raise LookupError(f"expected ErrorInfo in {self}")
        return info

    @property
    def fields(self) -> list[str]:
        """The refused fields' paths."""
        found = self.detail(error_details_pb2.BadRequest)
        return [] if found is None else [v.field for v in found.field_violations]

    @property
    def retry_after(self) -> float | None:
        """RetryInfo's seconds; None where the request is not to be repeated."""
        found = self.detail(error_details_pb2.RetryInfo)
        if found is None:
            return None
        seconds: float = found.retry_delay.ToTimedelta().total_seconds()
        return seconds


def refused(
    channel: grpc.Channel,
    method: str,
    request: Message,
    *,
    request_id: str | None = None,
    timeout: float = DEADLINE,
) -> Refusal:
    """Make a call that must fail."""
    metadata = () if request_id is None else ((REQUEST_ID, request_id),)
    call = started(channel, method, request, metadata=metadata, timeout=timeout)
    try:
        answer = list(call) if methods()[method].server_streaming else call.result()
    except grpc.RpcError:
        return refusal(call)
    raise LookupError(f"expected {method} to fail, got {answer}")


def started(channel: grpc.Channel, method: str, request: Message, **options: Any) -> Any:
    """The call, running: its results, status and metadata."""
    stub = service_pb2_grpc.IntrospectionServiceStub(channel)
    multicallable = getattr(stub, method)
    if methods()[method].server_streaming:
        return multicallable(request, **options)
    return multicallable.future(request, **options)


def refusal(call: Any) -> Refusal:
    """Status, details and metadata of a failed call."""
    headers = dict(call.initial_metadata() or ())
    trailers = dict(call.trailing_metadata() or ())
    packed = trailers.get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(packed)
    return Refusal(call.code(), call.details() or "", status, headers.get(REQUEST_ID))


def timeless(message: Message) -> bytes:
    """A message's bytes without what differs by design: times and ids."""
    copy: Any = type(message)()
    copy.CopyFrom(message)
    event = copy.WhichOneof("event") if "event" in copy.DESCRIPTOR.oneofs_by_name else None
    if event == "header":
        copy.header.ClearField("request_id")
    elif event == "summary":
        copy.summary.ClearField("times")
    serialized: bytes = copy.SerializeToString(deterministic=True)
    return serialized


def prompt(text: str) -> common_pb2.Input:
    """A text to run."""
    return common_pb2.Input(prompt=text)


def token_ids(*ids: int) -> common_pb2.Input:
    """Tokens to run."""
    return common_pb2.Input(token_ids=common_pb2.TokenIds(ids=ids))


def long_trace(n_positions: int) -> trace_pb2.TraceRequest:
    """A Trace of every part with its vector: several MB for each position of the demo."""
    return trace_pb2.TraceRequest(
        input=token_ids(*range(300, 300 + n_positions)),
        all_positions=True,
        include_vectors=True,
        selection=trace_pb2.Selection(heads=0, memory_values_per_head=0, top_neurons=0),
    )

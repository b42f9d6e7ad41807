"""Raw calls, as a client in any language makes them, and their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from januslens.v1 import (
    common_pb2,
    intervene_pb2,
    interventions_pb2,
    service_pb2,
    service_pb2_grpc,
    sites_pb2,
    trace_pb2,
)

SERVICE = "/januslens.v1.IntrospectionService/"
REQUEST_ID = "x-request-id"
DEADLINE = 60

Detail = TypeVar("Detail", bound=Message)


def methods() -> dict[str, Any]:
    """Return the descriptors of the service's methods by name."""
    service = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
    return {method.name: method for method in service.methods}


@dataclass(frozen=True)
class Refusal:
    """A failed call: its status, details by type, and the id in its headers."""

    code: grpc.StatusCode
    text: str
    status: status_pb2.Status
    request_id: str | None

    def detail(self, kind: type[Detail]) -> Detail | None:
        """Return the status's detail of this type."""
        for packed in self.status.details:
            found = kind()
            if packed.Unpack(found):
                return found
        return None

    @property
    def reason(self) -> str:
        """The reason of the ErrorInfo."""
        reason: str = self.info.reason
        return reason

    @property
    def info(self) -> Any:
        """The ErrorInfo; fails if there is none."""
        info = self.detail(error_details_pb2.ErrorInfo)
        if info is None:
            raise LookupError(f"expected ErrorInfo in {self}")
        return info

    @property
    def fields(self) -> list[str]:
        """The paths of the refused fields."""
        found = self.detail(error_details_pb2.BadRequest)
        return [] if found is None else [v.field for v in found.field_violations]

    @property
    def retry_after(self) -> float | None:
        """The seconds of the RetryInfo; None if the request must not be repeated."""
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
    """Make a call that must fail, and return its error."""
    metadata = () if request_id is None else ((REQUEST_ID, request_id),)
    call = started(channel, method, request, metadata=metadata, timeout=timeout)
    try:
        answer = list(call) if methods()[method].server_streaming else call.result()
    except grpc.RpcError:
        return refusal(call)
    raise LookupError(f"expected {method} to fail, got {answer}")


def started(channel: grpc.Channel, method: str, request: Message, **options: Any) -> Any:
    """Start a call; return its results, status and metadata."""
    stub = service_pb2_grpc.IntrospectionServiceStub(channel)
    multicallable = getattr(stub, method)
    if methods()[method].server_streaming:
        return multicallable(request, **options)
    return multicallable.future(request, **options)


def refusal(call: Any) -> Refusal:
    """Return status, details and metadata of a failed call."""
    headers = dict(call.initial_metadata() or ())
    trailers = dict(call.trailing_metadata() or ())
    packed = trailers.get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(packed)
    return Refusal(call.code(), call.details() or "", status, headers.get(REQUEST_ID))


def timeless(message: Message) -> bytes:
    """Return a message's bytes without times and ids, which differ by design."""
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
    """Return an input with this text."""
    return common_pb2.Input(prompt=text)


def token_ids(*ids: int) -> common_pb2.Input:
    """Return an input with these token ids."""
    return common_pb2.Input(token_ids=common_pb2.TokenIds(ids=ids))


def long_trace(n_positions: int) -> trace_pb2.TraceRequest:
    """Return a Trace of every part with its vector: several MB per position of the demo."""
    return trace_pb2.TraceRequest(
        input=token_ids(*range(300, 300 + n_positions)),
        all_positions=True,
        include_vectors=True,
        selection=trace_pb2.Selection(heads=0, memory_values_per_head=0, top_neurons=0),
    )


def long_sweep() -> intervene_pb2.InterveneRequest:
    """Return an Intervene that keeps the device busy for many seconds, with small effects.

    Its buffer is never full, so no other request of the same caller runs in between.
    """
    neurons = interventions_pb2.Intervention(
        site=sites_pb2.SITE_NEURONS, zero=True, positions=range(8)
    )
    return intervene_pb2.InterveneRequest(
        input=token_ids(*range(300, 380)),
        sweep=intervene_pb2.Sweep(
            template=neurons, by_layer=True, by_position=True, by_neuron=True
        ),
        top_k=0,
    )

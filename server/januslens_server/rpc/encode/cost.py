"""An estimate as a message."""

from __future__ import annotations

from collections.abc import Iterable

from januslens.v1 import cost_pb2
from januslens_server.errors import LimitExceeded
from januslens_server.rpc.admission import Estimate


def estimate_message(
    estimate: Estimate, exceeded: Iterable[LimitExceeded]
) -> cost_pb2.EstimateCostResponse:
    """`exceeded` are the limits that it is above."""
    limit = next((error.limit for error in exceeded), "")
    return cost_pb2.EstimateCostResponse(
        projected_vectors=estimate.demand.vectors,
        flops=estimate.demand.flops,
        device_bytes=estimate.cost.memory,
        stream_bytes=estimate.cost.stream,
        seconds=estimate.cost.seconds,
        admissible=not limit,
        limit_exceeded=limit,
    )

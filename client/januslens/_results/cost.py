"""What a request would take."""

from __future__ import annotations

from dataclasses import dataclass

from januslens.v1 import cost_pb2


@dataclass(frozen=True)
class CostEstimate:
    """What a server expects a request to take, and whether it would admit it.

    Attributes:
        seconds: Of the device, with nothing else running; usually within a factor of two.
        projected_vectors: Vectors that would go through the lens, at most.
        flops: Floating-point operations, at most.
        device_bytes: Bytes on the device beside the weights, at most.
        stream_bytes: Bytes of the whole answer, at most.
        admissible: Whether the server would admit the request, were it idle.
        limit_exceeded: The server's setting that stands against it; empty if admissible.
    """

    seconds: float
    projected_vectors: int
    flops: float
    device_bytes: int
    stream_bytes: int
    admissible: bool
    limit_exceeded: str

    @classmethod
    def from_message(cls, message: cost_pb2.EstimateCostResponse) -> CostEstimate:
        """Read the response."""
        return cls(
            seconds=message.seconds,
            projected_vectors=message.projected_vectors,
            flops=message.flops,
            device_bytes=message.device_bytes,
            stream_bytes=message.stream_bytes,
            admissible=message.admissible,
            limit_exceeded=message.limit_exceeded,
        )

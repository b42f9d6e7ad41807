"""What a request would take, without running it."""

from __future__ import annotations

from typing import Any

from januslens._results.cost import CostEstimate
from januslens._verbs.calls import Exchange, StreamCall, UnaryCall
from januslens.v1 import cost_pb2

SUMMARY = "What this would take, without running it; the arguments are the request's own."


def estimate(call: StreamCall[Any, Any, Any]) -> Exchange[CostEstimate]:
    """Ask for the cost of the call in place of making it."""
    request = cost_pb2.EstimateCostRequest()
    field = {"Trace": request.trace, "GradientLens": request.gradient_lens}[call.method]
    field.MergeFrom(call.request)
    field.SetInParent()
    response: cost_pb2.EstimateCostResponse = yield UnaryCall("EstimateCost", request, call.timeout)
    return CostEstimate.from_message(response)

"""OpenTelemetry spans of RPCs, exported if `OTEL_EXPORTER_OTLP_ENDPOINT` is set.

The SDK reads its own variables (`OTEL_*`). This module creates the spans itself, because the
available instrumentation of gRPC supports only streaming handlers that are generators.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# Status codes that mark a server span as failed, by OpenTelemetry's semantic conventions for gRPC.
# The other codes are errors of the caller.
ERRORS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}

_provider: TracerProvider | None = None


def configure() -> None:
    """Start exporting spans if an endpoint is set; exits if the extra is not installed."""
    global _provider  # noqa: PLW0603 - as the SDK keeps its own
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415 - optional
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - optional
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - optional
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - optional
    except ImportError as error:
        raise SystemExit(
            f"januslens-server: {ENDPOINTS[0]} requires OpenTelemetry, which is not installed; "
            "run pip install 'januslens[otel]'"
        ) from error
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "januslens"}
    _provider = TracerProvider(resource=Resource.create(named))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))


def shutdown() -> None:
    """Export the remaining spans, within the exporter's own timeout."""
    if _provider is not None:
        _provider.shutdown()


def start_span(service: str, method: str, metadata: Iterable[tuple[str, Any]]) -> Span | None:
    """Start a call's span, as a child of the caller's if it sent one; None if spans are off."""
    if _provider is None:
        return None
    from opentelemetry.propagate import extract  # noqa: PLC0415 - optional
    from opentelemetry.trace import SpanKind  # noqa: PLC0415 - optional

    return _provider.get_tracer("januslens").start_span(
        f"{service}/{method}",
        context=extract({key: value for key, value in metadata if isinstance(value, str)}),
        kind=SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
    )


def trace_id(span: Span) -> str:
    """Return the id of a span's trace as 32 hexadecimal digits, to find it from a log line."""
    return f"{span.get_span_context().trace_id:032x}"


def end_span(span: Span | None, code: str, number: int, fields: Mapping[str, Any]) -> None:
    """End a call's span with its status and the fields of its log line."""
    if span is None:
        return
    from opentelemetry.trace import StatusCode  # noqa: PLC0415 - optional

    span.set_attribute("rpc.grpc.status_code", number)
    for name, value in fields.items():
        if isinstance(value, Mapping):
            span.set_attributes({f"januslens.{name}.{part}": v for part, v in value.items()})
        elif isinstance(value, bool | int | float | str):
            span.set_attribute(f"januslens.{name}", value)
    if code in ERRORS:
        span.set_status(StatusCode.ERROR)
    span.end()

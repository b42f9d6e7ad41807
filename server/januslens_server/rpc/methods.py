"""The contract's own RPCs by name."""

from __future__ import annotations

from januslens.v1 import service_pb2

SERVICE = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
SERVICE_NAME = SERVICE.full_name
RPCS = tuple(method.name for method in SERVICE.methods)

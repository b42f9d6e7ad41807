"""Run a table of checks against a server with plain stubs, without the package `januslens`.

README.md describes the table and how to generate the stubs:

    PYTHONPATH=build/plain python tests/conformance/client.py 127.0.0.1:50051 SUITE.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from januslens.v1 import cost_pb2, service_pb2, service_pb2_grpc

SERVICE = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
MESSAGE_LIMIT = 2**20
DETAILS = (
    error_details_pb2.BadRequest,
    error_details_pb2.ErrorInfo,
    error_details_pb2.RetryInfo,
    cost_pb2.LimitViolations,
)


def as_json(message: Message) -> Any:
    """Return a message as the JSON in which all drivers compare."""
    return MessageToDict(message, preserving_proto_field_name=True)


def expanded(value: Any, saved: dict[str, Any]) -> Any:
    """Replace `$name` by a saved value, and `{"repeat": text, "times": n}` by the long text."""
    match value:
        case str() if value.startswith("$"):
            return saved[value[1:]]
        case {"repeat": str(text), "times": int(times)}:
            return text * times
        case dict():
            return {name: expanded(part, saved) for name, part in value.items()}
        case list():
            return [expanded(part, saved) for part in value]
    return value


def call(stub: Any, check: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Send the request of a check, and return what came back."""
    method = SERVICE.methods_by_name[check["rpc"]]
    request = ParseDict(expanded(check["request"], saved), GetMessageClass(method.input_type)())
    options = {
        "timeout": check.get("timeout_seconds", 60),
        "metadata": list(check.get("metadata", {}).items()),
    }
    seen: dict[str, Any] = {"status": "OK", "messages": [], "headers": {}, "details": {}}
    try:
        if method.server_streaming:
            stream = getattr(stub, method.name)(request, **options)
            for message in stream:
                if message.WhichOneof("event") == "waiting":  # no part of the result
                    continue
                seen["messages"].append(as_json(message))
                if len(seen["messages"]) == check.get("cancel_after"):
                    stream.cancel()
            headers = stream.initial_metadata()
        else:
            message, finished = getattr(stub, method.name).with_call(request, **options)
            seen["messages"].append(as_json(message))
            headers = finished.initial_metadata()
        seen["headers"] = dict(headers)
    except grpc.RpcError as error:
        seen["status"] = error.code().name
        seen["details"] = dict(details(error.trailing_metadata() or ()))
    return seen


def details(trailers: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and content of each detail of an error."""
    for name, value in trailers:
        if name == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                for known in DETAILS:
                    if packed.Is(known.DESCRIPTOR):
                        detail = known()
                        packed.Unpack(detail)
                        yield known.DESCRIPTOR.name, as_json(detail)


def found(value: Any, path: list[str]) -> Any:
    """Return the value at a path, None if there is none; `*` collects from every element."""
    for i, step in enumerate(path):
        if step == "*":
            parts = [found(part, path[i + 1 :]) for part in value or ()]
            return [part for part in parts if part is not None]
        if isinstance(value, list):
            value = value[int(step)] if -len(value) <= int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def holds(value: Any, expected: Any) -> bool:
    """Compare a value with what the table expects of it."""
    match expected:
        case {"absent": True}:
            held = value is None
        case {"near": number, "within": tolerance}:
            held = value is not None and abs(float(value) - number) <= tolerance
        case {"at_least": number}:
            held = value is not None and float(value) >= number
        case {"count": number}:
            held = isinstance(value, list) and len(value) == number
        case {"includes": part}:
            held = isinstance(value, list) and part in value
        case {"matches": pattern}:
            held = isinstance(value, str) and re.search(pattern, value) is not None
        case _:
            held = value == expected
    return held


def stream_faults(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what breaks the rules of every stream: header, items, summary; numbered from 0."""
    for number, message in enumerate(messages):
        if int(message.get("sequence", 0)) != number:
            yield f"message {number} has sequence {message.get('sequence', 0)}"
        if ("header" in message) != (number == 0):
            yield f"message {number}: expected a header in the first message only"
        if ("summary" in message) != (number == len(messages) - 1):
            yield f"message {number}: expected a summary in the last message only"


def faults(stub: Any, check: dict[str, Any], saved: dict[str, Any]) -> Iterator[str]:
    """Run one check, yield every difference, and save what later checks use."""
    seen = call(stub, check, saved)
    if seen["status"] != check.get("status", "OK"):
        yield f"status {seen['status']}, expected {check.get('status', 'OK')}"
    if seen["status"] == "OK" and SERVICE.methods_by_name[check["rpc"]].server_streaming:
        yield from stream_faults(seen["messages"])
    for path, expected in check.get("expect", {}).items():
        value = found(seen, path.split("."))
        if not holds(value, expanded(expected, saved)):
            yield f"{path}: {json.dumps(value)[:200]}, expected {json.dumps(expected)}"
    for name, path in check.get("save", {}).items():
        saved[name] = found(seen, path.split("."))


def main(address: str, table: str) -> int:
    """Run all checks, print those that fail, and return the exit status."""
    checks = json.loads(Path(table).read_text(encoding="utf-8"))["checks"]
    saved: dict[str, Any] = {}
    failed = 0
    with grpc.insecure_channel(
        address, options=[("grpc.max_receive_message_length", MESSAGE_LIMIT)]
    ) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        for check in checks:
            wrong = list(faults(stub, check, saved))
            failed += bool(wrong)
            for fault in wrong:
                print(f"{check['name']}: {fault}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Saved pages are made from JSON lines, possibly of a newer server."""

from __future__ import annotations

import json

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.testclient import TestClient

from januslens.ui.app import application
from januslens.ui.rpc_proxy import Gateway
from januslens.v1 import edits_pb2
from tests.client.messages import gradient_stream, trace_stream


def newer(message: Message) -> str:
    """A JSON line with a field that this version of the contract does not have."""
    return json.dumps(MessageToDict(message) | {"fieldOfANewerVersion": 1})


def test_saved_pages_ignore_unknown_fields() -> None:
    pages = {
        "/page/trace": {"trace": list(map(newer, trace_stream()))},
        "/page/gradient": {
            "gradient": list(map(newer, gradient_stream())),
            "preview:a step": [newer(edits_pb2.PreviewEditResponse())],
        },
    }
    token = "secret"  # noqa: S105 - of this test
    app = application(lambda: Gateway("127.0.0.1:1"), ["localhost"], token)
    with TestClient(app, base_url="http://localhost") as browser:
        for path, streams in pages.items():
            saved = browser.post(path, json=streams, headers={"x-januslens-token": token})
            assert saved.status_code == 200, saved.text
            assert saved.text.startswith("<!doctype html>")

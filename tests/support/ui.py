"""Run `januslens ui` as a separate process, and send plain HTTP requests to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from tests.support.tethered import tethered

ADDRESS = re.compile(r"http://(127\.0\.0\.1):(\d+)/#token=(\S+)")
TOKEN = "x-januslens-token"  # noqa: S105 - the header's name
SECONDS = 60


@dataclass(frozen=True)
class LivePage:
    """A running `januslens ui`, with its port and access token."""

    process: subprocess.Popen[str]
    host: str
    port: int
    token: str

    @property
    def origin(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def address(self) -> str:
        """The address that a user opens in the browser."""
        return f"{self.origin}/#token={self.token}"

    @contextmanager
    def request(
        self, method: str, path: str, body: str | bytes = b"", headers: Mapping[str, str] = {}
    ) -> Iterator[HTTPResponse]:
        """Send one request with these headers, yield its unread response, then disconnect."""
        content = body.encode() if isinstance(body, str) else body
        with closing(HTTPConnection(self.host, self.port, timeout=SECONDS)) as connection:
            connection.request(method, path, content, dict(headers))
            with connection.getresponse() as answer:
                yield answer

    def call(self, method: str, request: Message) -> AbstractContextManager[HTTPResponse]:
        """Call an RPC as the page does; yield the unread lines."""
        body = MessageToJson(request)
        return self.request("POST", f"/api/{method}", body, {TOKEN: self.token})

    def lines(self, method: str, request: Message) -> list[dict[str, Any]]:
        """Return all lines of the response to one call."""
        with self.call(method, request) as answer:
            return [json.loads(line) for line in answer]


@contextmanager
def live_page(server_address: str) -> Iterator[LivePage]:
    """Start the page on a free port for a server; interrupt it at the end."""
    arguments = ["ui", "--port", "0", "--server", server_address]
    process = subprocess.Popen(
        tethered([sys.executable, "-c", "from januslens.cli import main; main()", *arguments]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    with process:
        try:
            yield _announced(process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _announced(process: subprocess.Popen[str]) -> LivePage:
    line = process.stdout.readline() if process.stdout else ""
    match = ADDRESS.search(line)
    if match is None:
        raise LookupError(f"expected the page's address; got {line!r}")
    return LivePage(process, match[1], int(match[2]), match[3])

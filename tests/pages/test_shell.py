"""A page's file is self-contained; its data can neither send requests nor act as markup."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import zlib
from html.parser import HTMLParser

import januslens
from januslens.v1 import trace_pb2
from januslens.viewer.html import asset, page
from tests.client.messages import trace_stream


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_program_is_within_its_size_budget() -> None:
    program = asset("viewer.js").encode()
    assert len(program) <= 250_000
    assert len(gzip.compress(program)) <= 80_000


def test_program_and_style_do_not_close_their_elements() -> None:
    assert not re.search(r"</script|<!--", asset("viewer.js"), re.IGNORECASE)
    assert "</style" not in asset("viewer.css").lower()


def test_licences_of_bundled_packages_are_included() -> None:
    licences = asset("LICENSES.txt")
    assert "d3-selection" in licences
    assert "Permission to use, copy, modify" in licences


def test_title_is_escaped() -> None:
    text = page("trace", "</title><script>alert(1)</script>", {})
    assert "<script>alert(1)" not in text
    kinds = [attributes.get("type") for tag, attributes in Elements(text).found if tag == "script"]
    assert kinds == ["application/json", None]


def test_content_security_policy_allows_only_the_program() -> None:
    text = page("trace", "t", {})
    policy = next(a["content"] for tag, a in Elements(text).found if a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(asset("viewer.js").encode()).digest()).decode()
    assert policy
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_embedded_messages_equal_the_stream() -> None:
    messages = list(trace_stream())
    text = page("trace", "t", {"trace": messages})
    blocks = re.findall(r'data-stream="trace">([^<]+)<', text)
    lines = [zlib.decompress(base64.b64decode(block)).decode() for block in blocks]
    assert [*januslens.read_trace(lines).responses] == messages
    assert all(isinstance(message, trace_pb2.TraceResponse) for message in messages)

"""Pages of results with NaN and infinity: they draw, and show such values as "not finite"."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from playwright.sync_api import Page, expect

import januslens
from januslens.v1 import edits_pb2, gradient_lens_pb2, trace_pb2
from januslens.viewer.html import gradient_page, trace_page
from tests.pages.conftest import PROMPT, Traced
from tests.pages.test_trace_page import changed
from tests.support.server import ServerProcess

FLOATS = (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE)
VALUES = (math.nan, math.inf, -math.inf)
# Every attribute of every element, and the inline styles.
ATTRIBUTES = """() => [...document.querySelectorAll('body *')].flatMap((element) =>
  [...element.attributes]
    .filter(({ value }) => /NaN|Infinity/.test(value))
    .map(({ name, value }) => `${element.tagName} ${name}=${value}`))"""


def replace_floats(message: Message, values: Iterator[float]) -> None:
    """Replace every float that is set in a message with the next non-finite value."""
    for field, value in message.ListFields():
        repeated = not isinstance(value, str | bytes | int | float | bool | Message)
        if field.type in FLOATS and repeated:
            value[:] = [next(values) for _ in value]
        elif field.type in FLOATS:
            setattr(message, field.name, next(values))
        elif isinstance(value, Message):
            replace_floats(value, values)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and not hasattr(value, "items"):
            for entry in value:
                replace_floats(entry, values)


MessageT = TypeVar("MessageT", bound=Message)


def corrupted(messages: Iterable[MessageT]) -> list[MessageT]:
    values = itertools.cycle(VALUES)
    copies = []
    for message in messages:
        copy = type(message)()
        copy.CopyFrom(message)
        replace_floats(copy, values)
        copies.append(copy)
    return copies


def opened(tab: Page, path: Path, text: str, state: str) -> None:
    path.write_text(text, encoding="utf-8")
    tab.goto(f"{path.as_uri()}#{state}")
    tab.wait_for_selector("html[data-ready=complete]", state="attached")


def test_trace_with_non_finite_numbers_draws(tab: Page, demo: Traced, tmp_path: Path) -> None:
    trace: list[trace_pb2.TraceResponse] = corrupted(demo.trace.responses)
    overview = corrupted(demo.overview.responses)
    text = trace_page(trace, overview, demo.trace.prompt_tokens)
    node = demo.trace.nodes_of("MEMORY_VALUE")[-1].id
    opened(tab, tmp_path / "trace.html", text, f"sel={node}")
    for state in ("", "map=heads", "view=table", "path=1&q=Tokyo"):
        changed(tab, f"{state}&sel={node}")
        assert tab.evaluate(ATTRIBUTES) == [], state
        measures = tab.locator(".facts .measures")
        expect(measures).to_contain_text("norm\nnot finite", use_inner_text=True)
        expect(tab.locator(".story")).to_contain_text("probability not finite")


def test_gradient_with_non_finite_numbers_draws(
    tab: Page, server: ServerProcess, tmp_path: Path
) -> None:
    edit = januslens.ForwardShift(3, eta=0.15)
    with januslens.Client(server.address) as client:
        gradient = client.gradient_lens(
            PROMPT, " Paris", neurons=2, spectrum=2, subject="Japan", verify=True
        )
        preview = client.preview_edit(PROMPT, " Paris", edit)
    responses: list[gradient_lens_pb2.GradientLensResponse] = corrupted(gradient.responses)
    effects: list[edits_pb2.PreviewEditResponse] = corrupted([preview.response])
    text = gradient_page(responses, {"Shift": effects[0]}, gradient.prompt_tokens)
    opened(tab, tmp_path / "gradient.html", text, "sel=L3/p7/FF2")
    assert tab.evaluate(ATTRIBUTES) == []
    expect(tab.locator(".facts .measures")).to_contain_text("not finite")
    expect(tab.locator(".story")).to_contain_text("Loss not finite")

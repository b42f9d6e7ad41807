"""A real browser, and pages of real traces to load into it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Request,
    sync_playwright,
)

import januslens
from tests.pages.models import HOSTILE, random_gpt2, random_mixtral
from tests.support.server import ServerProcess, running_server

PROMPT = "The capital of Japan is the city of"
# Milliseconds from a change of the page's state to the next frame.
ELAPSED = """async (state) => {
  const start = performance.now()
  location.hash = state
  await new Promise((done) => addEventListener('hashchange', () =>
    requestAnimationFrame(() => setTimeout(done, 0)), { once: true }))
  return performance.now() - start
}"""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    """The path of the system's browser; without one, the tests fail."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.fail("expected chromium to look at the pages with; install it (apt-get, brew, ...)")
    return executable


# Not for the whole session, because no asynchronous test can run in this thread meanwhile.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium(), args=FLAGS)


@pytest.fixture(scope="package")
def shared_tab(browser: Browser) -> Iterator[tuple[Page, list[str]]]:
    """One page for all tests, as another one takes as long to open as a file; and what it says."""
    page = browser.new_page()
    complaints: list[str] = []

    def logged(message: ConsoleMessage) -> None:
        complaints.append(f"{message.type}: {message.text}")

    def raised(error: Error) -> None:
        complaints.append(f"raised: {error}")

    def asked(request: Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            complaints.append(f"asked for {request.url}")

    page.on("console", logged)
    page.on("pageerror", raised)
    page.on("request", asked)
    yield page, complaints
    page.context.close()


@pytest.fixture
def tab(shared_tab: tuple[Page, list[str]]) -> Iterator[Page]:
    """An empty page to load a file into; the test fails if it logs or requests anything."""
    page, complaints = shared_tab
    complaints.clear()
    page.set_viewport_size({"width": 1440, "height": 900})
    page.emulate_media(media="null", color_scheme="light", forced_colors="none")
    yield page
    page.goto("about:blank")  # a link to another state of the same file would not load it anew
    assert complaints == []


def wait_until(tab: Page, expression: str) -> None:
    """Wait until a JavaScript expression is true.

    Playwright's `wait_for_function` calls `eval` in the page, which the page's policy forbids.
    """
    deadline = time.monotonic() + 60
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, f"still false after a minute: {expression}"
        tab.wait_for_timeout(20)


def in_sight(tab: Page, part: Locator) -> bool:
    """Whether a part is in the window as a whole, and above the facts that a narrow one shows."""
    box, facts = part.bounding_box(), tab.locator(".inspector").bounding_box()
    window = tab.viewport_size
    assert box
    assert facts
    assert window
    uncovered = facts["x"] >= box["x"] + box["width"] or facts["y"] >= box["y"] + box["height"]
    inside = box["x"] >= 0 and box["x"] + box["width"] <= window["width"]
    return uncovered and inside and 0 <= box["y"] <= window["height"] - box["height"]


def exported(
    tab: Page, file_format: str, to: Path, *, size: str = "screen", panels: int = 99
) -> Path:
    """Export the first panels of a page in a format, and return the file."""
    tab.get_by_role("button", name="Export", exact=True).click()
    tab.get_by_label("Size").select_option(size)
    for box in tab.locator(".export-panels input").all()[panels:]:
        box.uncheck()
    with tab.expect_download() as download:
        tab.get_by_role("button", name=file_format, exact=True).click()
    download.value.save_as(to)
    return to


@dataclass(frozen=True)
class Traced:
    """A trace with its overview, and the file of its page."""

    trace: januslens.Trace
    overview: januslens.Trace
    path: Path

    @property
    def url(self) -> str:
        return self.path.as_uri()

    def node(self, node_id: str) -> januslens.Node:
        """Return a node of the trace or of its overview."""
        traced = self.trace.known_nodes
        return traced[node_id] if node_id in traced else self.overview.known_nodes[node_id]


def traced(client: januslens.Client, path: Path, prompt: str | list[int], **asked: Any) -> Traced:
    trace = client.trace(prompt, **asked)
    overview = client.trace_overview(trace)
    path.write_text(trace.to_html(overview), encoding="utf-8")
    return Traced(trace, overview, path)


@pytest.fixture(scope="session")
def demo(server_address: str, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """The running example on the embedded model."""
    with januslens.Client(server_address) as client:
        return traced(client, tmp_path_factory.mktemp("pages") / "demo.html", PROMPT)


@pytest.fixture(scope="session")
def wide(server_address: str, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Four layers at twenty positions, with all parts."""
    with januslens.Client(server_address) as client:
        path = tmp_path_factory.mktemp("pages") / "wide.html"
        return traced(client, path, list(range(300, 320)), positions="all")


@pytest.fixture(scope="session")
def random_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Serves `random`, with twelve layers and 50,257 tokens, and `mixture`, with experts."""
    folder = tmp_path_factory.mktemp("random")
    models = {
        "random": random_gpt2(folder / "random"),
        "mixture": random_mixtral(folder / "mixture"),
    }
    flags = [flag for name, path in models.items() for flag in ("--model", f"{name}={path}")]
    with running_server(*flags) as server:
        yield server


@pytest.fixture(scope="session")
def large(random_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Twelve layers, 50,257 tokens, and a prompt of tokens that could break a page."""
    with januslens.Client(random_server.address) as client:
        path = tmp_path_factory.mktemp("pages") / "large.html"
        return traced(client, path, hostile_prompt(client), model="random")


def hostile_prompt(client: januslens.Client) -> list[int]:
    """Return tokens of `random` that could break a page."""
    texts = [client.tokenize(text, model="random")[:2] for text in HOSTILE]
    return [token.id for tokens in texts for token in tokens]

"""A real browser, and pages of real traces to load into it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, sync_playwright

import januslens

PROMPT = "The capital of Japan is the city of"
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# Not for the whole session: as long as it lives no asynchronous test can run in this thread.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium without a window; the pages are shown in nothing less."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.fail("expected chromium to look at the pages with; install it (apt-get, brew, ...)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=_FLAGS)


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    """A page to load a file into; the test fails if it logs anything or asks for anything."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    complaints: list[str] = []

    def logged(message: ConsoleMessage) -> None:
        complaints.append(f"{message.type}: {message.text}")

    def raised(error: Error) -> None:
        complaints.append(f"raised: {error}")

    def asked(request: Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            complaints.append(f"asked for {request.url}")

    page.on("console", logged)
    page.on("pageerror", raised)
    page.on("request", asked)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def demo_trace(server_address: str) -> tuple[januslens.Trace, januslens.Trace]:
    """The running example on the embedded model, and what surrounds it."""
    with januslens.Client(server_address) as client:
        trace = client.trace(PROMPT)
        return trace, client.trace_overview(trace)


@pytest.fixture(scope="session")
def demo_page(
    demo_trace: tuple[januslens.Trace, januslens.Trace], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its page."""
    trace, overview = demo_trace
    path = tmp_path_factory.mktemp("pages") / "demo.html"
    path.write_text(trace.to_html(overview))
    return path

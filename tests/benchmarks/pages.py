"""Measure how quickly pages draw and respond: `python -m tests.benchmarks.pages`.

The browser is a headless Chromium with software rendering. Measured are the first drawing, from the
navigation on; each interaction, from the change of state to the next frame; clicks, from the press
of the button to the next frame, by the browser's Event Timing (rounded to 8 ms); and the time of
the main thread for one move of the pointer, including style, layout and painting.

The traces are those of the tests: the demo; twelve layers of a random model with 50,257 tokens at
one position; four layers of the demo at twenty positions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.table import Table

import januslens
from tests.benchmarks import gradient_pages, live_pages
from tests.pages.conftest import ELAPSED, FLAGS, PROMPT, Traced, chromium, traced
from tests.pages.models import HOSTILE, random_gpt2
from tests.support.server import running_server
from tests.support.ui import live_page

INTERACTIONS = {
    "select": "sel=L2/p7/BLOCK_OUTPUT",
    "another layer": "layers=1",
    "three layers": "layers=0,1,2",
    "follow the path": "layers=3&path=1",
    "search": "layers=3&q=a",
    "threshold": "layers=3&min=5",
    "dark": "layers=3&min=5&theme=dark",
    "table": "layers=3&view=table&theme=dark",
}
CLICKS = {
    "click a chip": "svg.detail .chip >> nth=20",
    "click a cell": "svg.overview .cell[data-id] >> nth=6",  # of another layer, maybe position
}
MOVES = 40
# Collects the time from each event to the frame that shows its effect.
OBSERVE = """() => {
  window.took = []
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) window.took.push(entry.duration)
  }).observe({ type: 'event', durationThreshold: 16 })
}"""


def main() -> None:
    """Create the pages, measure them, and print the milliseconds."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        for table in tables(browser, Path(folder)):
            Console(width=180).print(table)
        browser.close()


def tables(browser: Browser, folder: Path) -> Iterator[Table]:
    """Return the tables of traces, gradients and the live page."""
    model = random_gpt2(folder / "model")
    with running_server() as server, januslens.Client(server.address) as client:
        demo = traced(client, folder / "demo.html", PROMPT)
        wide = traced(client, folder / "wide.html", list(range(300, 320)), positions="all")
        learnt = gradient_pages.demo(client, folder)
    with running_server("--model", f"random={model}") as server:
        with januslens.Client(server.address) as client:
            large = traced(client, folder / "large.html", list(range(300, 314)))
            deep = gradient_pages.large(client, folder)
        yield of_traces(browser, {"demo": demo, "12 layers x 1": large, "4 layers x 20": wide})
        yield gradient_pages.table(browser, {"demo": learnt, "12 layers x 14": deep})
        with live_page(server.address) as live:
            yield live_pages.table(browser, live, HOSTILE[0] * 14, HOSTILE[1])


def of_traces(browser: Browser, pages: dict[str, Traced]) -> Table:
    """Return a table with one row per page."""
    table = Table("ms, trace", "kB", "first drawing", *INTERACTIONS, *CLICKS, "hover")
    for name, page in pages.items():
        size = page.path.stat().st_size / 1e3
        row = [f"{value:.0f}" for value in (size, *measured(browser, page))]
        table.add_row(name, *row)
    return table


def measured(browser: Browser, page: Traced) -> list[float]:
    """Return the milliseconds of the first drawing and of each interaction."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    tab.goto(page.url)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    tab.wait_for_timeout(500)
    drawn: float = tab.evaluate("performance.getEntriesByName('januslens-drawn')[0].startTime")
    figures = [drawn, *(tab.evaluate(ELAPSED, state) for state in INTERACTIONS.values())]
    figures += [*clicks(tab, page), hover(tab, page)]
    tab.close()
    return figures


def clicks(tab: Page, page: Traced) -> list[float]:
    """Return the milliseconds from each click to the frame that responds to it."""
    afresh(tab, page)
    tab.evaluate(OBSERVE)
    found: list[float] = []
    for chosen in CLICKS.values():
        tab.locator(chosen).click(force=True)
        tab.wait_for_timeout(400)
        found.append(max([0.0, *tab.evaluate("window.took.splice(0)")]))
    return found


def hover(tab: Page, page: Traced) -> float:
    """Return the milliseconds of the main thread for a move of the pointer between two chips."""
    afresh(tab, page)
    boxes = [chip.bounding_box() for chip in tab.locator("svg.detail .chip").all()[:MOVES]]
    devtools = tab.context.new_cdp_session(tab)
    devtools.send("Performance.enable")

    def busy() -> float:
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        return next(1e3 * float(m["value"]) for m in metrics if m["name"] == "TaskDuration")

    before = busy()
    for box in boxes:
        assert box
        tab.mouse.move(box["x"] + 9, box["y"] + 9)
        tab.wait_for_timeout(50)
    return (busy() - before) / len(boxes)


def afresh(tab: Page, page: Traced) -> None:
    """Load the page anew, at its last layer."""
    tab.goto("about:blank")
    tab.goto(page.url)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    tab.wait_for_timeout(500)


if __name__ == "__main__":
    main()

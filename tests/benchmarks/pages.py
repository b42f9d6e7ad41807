"""How quickly pages show themselves and answer: `python -m tests.benchmarks.pages`.

In a headless Chromium that draws in software: the first drawing, counted from the navigation, and
each interaction from the change of state to the next frame. The traces are those of the tests: the
demo, twelve layers of a random model with 50,257 tokens at one position, four layers of the demo at
twenty positions.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table

import januslens
from tests.pages.conftest import ELAPSED, FLAGS, PROMPT, Traced, chromium, traced
from tests.pages.models import random_gpt2
from tests.support.server import running_server

INTERACTIONS = {
    "select": "sel=L2/p7/BLOCK_OUTPUT",
    "another layer": "layers=1",
    "three layers": "layers=0,1,2",
    "follow the path": "layers=3&path=1",
    "search": "layers=3&q=a",
    "threshold": "layers=3&min=5",
    "table": "layers=3&view=table",
    "dark": "theme=dark",
}


def main() -> None:
    """Make the pages, measure them, print milliseconds."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        table = Table("ms", "kB", "first drawing", *INTERACTIONS)
        for name, page in pages(Path(folder)).items():
            size = page.path.stat().st_size / 1e3
            row = [f"{value:.0f}" for value in (size, *measured(browser, page))]
            table.add_row(name, *row)
        browser.close()
        Console(width=140).print(table)


def pages(folder: Path) -> dict[str, Traced]:
    """The traces of the tests, as pages."""
    model = random_gpt2(folder / "model")
    with running_server() as server, januslens.Client(server.address) as client:
        demo = traced(client, folder / "demo.html", PROMPT)
        wide = traced(client, folder / "wide.html", list(range(300, 320)), positions="all")
    with (
        running_server("--model", f"random={model}") as server,
        januslens.Client(server.address) as client,
    ):
        large = traced(client, folder / "large.html", list(range(300, 314)))
    return {"demo": demo, "12 layers x 1": large, "4 layers x 20": wide}


def measured(browser: Browser, page: Traced) -> list[float]:
    """Milliseconds of the first drawing and of each interaction."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    tab.goto(page.url)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    tab.wait_for_timeout(500)
    drawn: float = tab.evaluate("performance.getEntriesByName('januslens-drawn')[0].startTime")
    figures = [drawn, *(tab.evaluate(ELAPSED, state) for state in INTERACTIONS.values())]
    tab.close()
    return figures


if __name__ == "__main__":
    main()

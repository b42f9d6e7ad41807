"""Measure how quickly a gradient's page draws and responds; see `tests.benchmarks.pages`."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser
from rich.table import Table

import januslens
from tests.pages.conftest import ELAPSED, PROMPT

# Each one changes the state that the previous one left, so that each draws a single change.
INTERACTIONS = {
    "select": "sel=L2/p7/FF2",
    "inputs of Q": "sel=L2/p7/FF2&imprint=Q",
    "VJPs of O": "sel=L2/p7/FF2&imprint=Q&shift=O",
    "ranks in Q": "sel=L2/p7/FF2&imprint=Q&shift=O&rank=Q",
    "promoted only": "sel=L2/p7/FF2&imprint=Q&shift=O&rank=Q&ends=promoted",
    "both ends": "sel=L2/p7/FF2&imprint=Q&shift=O&rank=Q",
    "neurons of FF1": "sel=L2/p7/FF2&shift=O&rank=Q",
    "search": "sel=L2/p7/FF2&shift=O&rank=Q&q=a",
    "dark": "sel=L2/p7/FF2&shift=O&rank=Q&q=a&theme=dark",
}
KINDS = ["FF1", "FF2", "Q", "K", "V", "O"]


def page(
    client: januslens.Client, path: Path, prompt: str | list[int], target: str | list[int]
) -> Path:
    """Return a gradient's page with six matrices per layer, neurons and spectra."""
    gradient = client.gradient_lens(
        prompt, target, matrices=KINDS, components=0, neurons=2, learning_rate=1e-3, spectrum=2
    )
    path.write_text(gradient.to_html(), encoding="utf-8")
    return path


def demo(client: januslens.Client, folder: Path) -> Path:
    """Return the page of the running example."""
    return page(client, folder / "gradient-demo.html", PROMPT, " Paris")


def large(client: januslens.Client, folder: Path) -> Path:
    """Return the page of fourteen positions of a random model with twelve layers."""
    return page(client, folder / "gradient-large.html", list(range(300, 314)), [500])


def measured(browser: Browser, path: Path) -> list[float]:
    """Return the milliseconds of the first drawing and of each interaction."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    tab.wait_for_timeout(500)
    drawn: float = tab.evaluate("performance.getEntriesByName('januslens-drawn')[0].startTime")
    figures = [drawn, *(tab.evaluate(ELAPSED, state) for state in INTERACTIONS.values())]
    tab.close()
    return figures


def table(browser: Browser, pages: dict[str, Path]) -> Table:
    """Return a table with one row per page."""
    made = Table("ms, gradient", "kB", "first drawing", *INTERACTIONS)
    for name, path in pages.items():
        size = path.stat().st_size / 1e3
        made.add_row(name, *(f"{value:.0f}" for value in (size, *measured(browser, path))))
    return made

"""Measure how soon the live page shows a layer that has arrived; see `tests.benchmarks.pages`."""

from __future__ import annotations

import statistics
from typing import Any

from playwright.sync_api import Browser
from rich.table import Table

from tests.support.ui import LivePage

# The page records when each message was first read (the overview comes after the trace). The
# result's frame records when the picture with it was drawn.
OBSERVE = """(() => {
  const now = () => performance.timeOrigin + performance.now()
  if (window === window.top) {
    window.arrived = {}
    const parse = JSON.parse
    JSON.parse = (text, ...rest) => {
      const found = parse(text, ...rest)
      if (found?.layer || found?.matrix) window.arrived[found.sequence] ??= now()
      return found
    }
    return
  }
  window.seen = {}
  addEventListener('message', ({ data }) => {
    const { stream, message } = data
    if (stream === 'overview' || !(message?.layer || message?.matrix)) return
    requestAnimationFrame(() => setTimeout(() => { window.seen[message.sequence] = now() }, 0))
  })
})()"""
ASKED = {"trace": "Trace", "gradient": "Gradient"}


def table(browser: Browser, live: LivePage, prompt: str, target: str) -> Table:
    """Return one row per request: the time from a message's arrival to the frame that shows it."""
    made = Table("ms, live", "messages", "median", "longest", "whole answer")
    for view, words in ASKED.items():
        took, whole = measured(browser, live, words, prompt, target)
        figures = (len(took), statistics.median(took), max(took), whole)
        made.add_row(view, *(f"{figure:.0f}" for figure in figures))
    return made


def measured(
    browser: Browser, live: LivePage, words: str, prompt: str, target: str
) -> tuple[list[float], float]:
    """Return the milliseconds for each layer or matrix, and from the click to the end."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    tab.add_init_script(OBSERVE)
    tab.goto(live.address)
    tab.get_by_label("Prompt").fill(prompt)
    tab.get_by_label("Target").fill(target)
    tab.get_by_text("more", exact=True).click()
    start = tab.evaluate("performance.now()")
    tab.get_by_role("button", name=words, exact=True).click()
    tab.wait_for_selector("[data-state=done]", timeout=60_000)
    whole: float = tab.evaluate("performance.now()") - start
    tab.wait_for_timeout(500)
    frame = tab.frames[1]
    arrived: dict[str, Any] = tab.evaluate("window.arrived")
    seen: dict[str, Any] = frame.evaluate("window.seen")
    tab.close()
    return [seen[sequence] - arrived[sequence] for sequence in seen], whole

"""Pages of long prompts and many scripts: every width, both themes, zoom, print, and times.

The model has 30 layers. Texts of other scripts replace the texts of its tokens in the recorded
trace, so that each token of the prompt is a word of the script.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import pytest
from playwright.sync_api import Page

import januslens
from tests.pages.conftest import ELAPSED, browser, shared_tab, tab, wait_until
from tests.pages.models import HOSTILE, random_gpt2
from tests.support.axe import serious_findings
from tests.support.server import running_server

__all__ = ["browser", "shared_tab", "tab"]  # fixtures

LAYERS, POSITIONS = 30, 2048
LENGTHS = (1, 10, 60, 350, 2000)
SCRIPTS = {
    "Arabic": "عاصمة اليابان هي مدينة طوكيو 2024".split(),
    "Hebrew": "בירת יפן היא העיר טוקיו".split(),
    "Thai": ["เมืองหลวง", "ของ", "ประเทศ", "ญี่ปุ่น", "คือ"],
    "Chinese": ["日本", "的", "首都", "是", "东京"],
    "emoji": ["👩🏽‍🚀", "🇯🇵", "🎉", "❤️", "1️⃣"],
    "code": ["def", " f", "(x):", "\n\t", "return", " {'a': x[0]}", "  # $HOME\\n"],
    "hostile": HOSTILE,
}
CASES = [*map(str, LENGTHS), *SCRIPTS]
# Pixels of a window; 720 is a window of 1440 at a zoom of 200 %.
WIDTHS = (1920, 1440, 1024, 768, 720, 390)
SHEET = 718  # pixels of A4 within Chromium's margins
# Texts of pictures that reach beyond the picture, which cuts them, and pictures beyond their box.
CUT = """() => {
  const cut = []
  for (const picture of document.querySelectorAll('svg.picture')) {
    const box = picture.getBoundingClientRect()
    if (box.width === 0) continue
    for (const text of picture.querySelectorAll('text')) {
      const own = text.getBoundingClientRect()
      const beyond = Math.max(own.right - box.right, box.left - own.left)
      if (own.width > 0 && beyond > 1) cut.push([picture.classList[1], text.textContent, beyond])
    }
  }
  return cut
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Returns the file of a case's page; makes it on the first call."""
    folder = tmp_path_factory.mktemp("pages")
    model = random_gpt2(folder / "model", layers=LAYERS, positions=POSITIONS)
    with (
        running_server("--model", f"random={model}") as server,
        januslens.Client(server.address) as client,
    ):

        @cache
        def traced(length: int) -> tuple[januslens.Trace, januslens.Trace]:
            trace = client.trace([300 + i % 5000 for i in range(length)])
            return trace, client.trace_overview(trace)

        @cache
        def made(case: str) -> Path:
            trace, around = traced(10 if case in SCRIPTS else int(case))
            if case in SCRIPTS:
                trace, around = (_in_words(one, SCRIPTS[case]) for one in (trace, around))
            path = folder / f"{case}.html"
            path.write_text(trace.to_html(around), encoding="utf-8")
            return path

        yield made


def _in_words(trace: januslens.Trace, words: list[str]) -> januslens.Trace:
    lines = [json.loads(line) for line in trace.to_json_lines()]
    texts: dict[int, str] = {}
    prompt = lines[0]["header"]["promptTokens"]
    for token, text in zip(prompt, islice(cycle(words), len(prompt)), strict=True):
        texts[token["id"]] = text
        token["text"] = text
    return januslens.read_trace(map(json.dumps, lines))


def _open(tab: Page, path: Path, state: str = "") -> None:
    tab.goto(f"{path.as_uri()}#{state}")
    wait_until(tab, "document.documentElement.dataset.ready === 'complete'")


@pytest.mark.parametrize("case", CASES)
def test_no_text_is_cut_in_any_width_theme_or_print(
    tab: Page, pages: Callable[[str], Path], case: str
) -> None:
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        _open(tab, pages(case))
        for theme in ("light", "dark"):
            tab.evaluate(f"location.hash = 'theme={theme}'")
            tab.wait_for_timeout(50)
            assert tab.evaluate(CUT) == [], (width, theme)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
    sheets = re.findall(rb"/Type\s*/Page\b", tab.pdf(format="A4"))
    assert 1 <= len(sheets) <= 8
    tab.set_viewport_size({"width": SHEET, "height": 1000})
    tab.emulate_media(media="print")
    _open(tab, pages(case))
    assert tab.evaluate(CUT) == []
    edges = "all => all.map(s => s.getBoundingClientRect()).map(b => [b.right, b.height])"
    for right, height in tab.locator("svg.picture").evaluate_all(edges):
        assert right <= SHEET
        assert height <= 235 / 25.4 * 96 + 1
    tab.emulate_media(media="screen")


@pytest.mark.parametrize("case", ["350", "Arabic", "hostile"])
@pytest.mark.parametrize("width", [1440, 390])
def test_axe_reports_nothing_serious(
    tab: Page, pages: Callable[[str], Path], case: str, width: int
) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    _open(tab, pages(case))
    assert serious_findings(tab) == []


def test_thirty_layers_are_drawn_and_answer_at_once(
    tab: Page, pages: Callable[[str], Path]
) -> None:
    drawn = []
    for _ in range(5):
        _open(tab, pages("60"))
        mark = "performance.getEntriesByName('januslens-drawn')[0].startTime"
        navigated = "performance.getEntriesByType('navigation')[0].responseEnd"
        drawn.append(tab.evaluate(f"{mark} - {navigated}"))
        tab.goto("about:blank")
    assert statistics.median(drawn) < 300  # ms
    _open(tab, pages("60"))
    states = ["sel=L29/p59/BLOCK_OUTPUT", "layers=3", "q=a", "path=1", "map=heads", "arcs=share"]
    taken = {state: tab.evaluate(ELAPSED, state) for state in states}
    assert statistics.median(taken.values()) < 100, taken

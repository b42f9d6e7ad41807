"""The page of two traces: one scale, differences that add up, and the residual streams."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

import januslens
from januslens import TraceComparison
from tests.pages.conftest import PROMPT, Traced, exported, wait_until

OTHER = "The capital of Peru is the city of"


@pytest.fixture(scope="module")
def compared(demo: Traced, server_address: str) -> Iterator[TraceComparison]:
    with januslens.Client(server_address) as client:
        target = demo.trace.target().target
        yield demo.trace.compare(client.trace(OTHER, target.text))


@pytest.fixture(scope="module")
def page(compared: TraceComparison, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the page."""
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"
    path.write_text(compared.to_html(), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(tab: Page, page: str) -> Page:
    tab.goto(page)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    return tab


def _number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def test_rows_of_the_differences_add_up_to_both_logits(
    opened: Page, compared: TraceComparison
) -> None:
    shown = opened.locator("svg.differences .numbers text").all_text_contents()
    names = opened.locator("svg.differences .names text").all_text_contents()
    assert len(shown) == 3 * len(names)
    tolerance = 0.006 * len(names)
    for i, trace in enumerate((compared.before, compared.after)):
        logit = trace.why().contribution
        assert math.fsum(map(_number, shown[i::3])) == pytest.approx(logit, abs=tolerance)
    contributions = {
        edge.before.source: (edge.before.logit_contribution, edge.after.logit_contribution)
        for edge in compared.edge_list
        if edge.before.logit_contribution is not None
    }
    for i, name in enumerate(opened.locator("svg.differences .names [data-id]").all()):
        before, after = contributions[name.get_attribute("data-id") or ""]
        assert before is not None
        assert after is not None
        expected = [before, after, after - before]
        found = [_number(text) for text in shown[3 * i : 3 * i + 3]]
        assert found == pytest.approx(expected, abs=0.006)


def test_exported_figure_names_both_prompts(opened: Page, tmp_path: Path) -> None:
    svg = exported(opened, "SVG", tmp_path / "two.svg", size="page").read_text(encoding="utf-8")
    texts = re.sub("[\u2066-\u2069]", "", " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg)))
    for shown in (f"Before: {PROMPT}", f"After: {OTHER}", "Before: where", "After: where"):
        assert shown in texts
    assert texts.count("model demo") == 1
    assert "What differs: what each part adds to the logit of ␣Tokyo" in texts
    assert svg.count('class="key bin-') == 7  # the legend of ranks


def test_four_panels_fit_in_a_window_of_1024_pixels(opened: Page) -> None:
    opened.set_viewport_size({"width": 1024, "height": 900})
    wait_until(
        opened,
        """() => {
      const boxes = ['.why-box', '.overview-box'].map((kind) =>
        [...document.querySelectorAll(kind)].map((box) => box.getBoundingClientRect()))
      return boxes.every(([left, right]) =>
        left.top === right.top && left.right < right.left && right.right <= 1024)
    }""",
    )
    boxes = [opened.locator(name).first.bounding_box() for name in ("h1", ".why-box")]
    assert len({box["x"] for box in boxes if box}) == 1


def test_both_figures_have_one_scale_and_one_selection(
    opened: Page, compared: TraceComparison
) -> None:
    expect(opened.locator("h1")).to_have_count(2)
    # The height of the stack is the sum of the absolute contributions that the figure shows.
    scales = []
    for figure in opened.locator("svg.why").all():
        amounts = figure.locator(".parts .amount").all_text_contents()
        total = math.fsum(abs(_number(text)) for text in amounts)
        scales.append(float(figure.locator(".stack").get_attribute("height") or 0) / total)
    assert scales[0] == pytest.approx(scales[1], rel=0.02)
    head = opened.locator('svg.why [data-id="L3/p7/HEAD_OUTPUT/h2"].chip')
    opened.locator("svg.differences .names [data-id='L3/p7/HEAD_OUTPUT/h2']").click()
    for chip in head.all():
        expect(chip).to_have_class(re.compile("selected"))
    assert compared.before.prompt_tokens[3].text.strip() in opened.locator("h1").first.inner_text()
    name = opened.locator("svg.differences .names [data-id='L3/p7/HEAD_OUTPUT/h2']")
    name.focus()
    for key in ("ArrowDown", "ArrowUp", "Enter", "n"):
        opened.keyboard.press(key)
    opened.keyboard.type("capitals")
    opened.keyboard.press("Enter")
    expect(name).to_have_text("L3 head 2 “capitals”")
    assert "names=" in opened.url
    for chip in head.all():
        expect(chip.locator(".name")).to_have_text(re.compile("^L3 head 2 “capi"))


def test_residual_streams_show_the_top_tokens_of_both(
    opened: Page, compared: TraceComparison
) -> None:
    shown = opened.locator("svg.heat .line-0 .body").all_text_contents()
    nodes = [
        (layer.layer, node)
        for layer in reversed(compared.before.layers)
        for trace in (compared.before, compared.after)
        for node in trace.nodes_of("BLOCK_OUTPUT", 7)
        if node.layer == layer.layer
    ]
    expected = [str(node.projection.top_tokens[0]) for _, node in nodes if node.projection]
    assert len(expected) == 8
    assert [text.strip("\u2068\u2069") for text in shown] == expected


def test_prompts_of_different_lengths_share_their_ends(
    tab: Page, demo: Traced, server_address: str, tmp_path: Path
) -> None:
    with januslens.Client(server_address) as client:
        longer = client.trace(f"{PROMPT} the city of", demo.trace.target().target.text)
    compared = demo.trace.compare(longer, positions="shared")
    assert compared.positions is not None
    assert compared.positions[7] == len(longer.prompt_tokens) - 1
    path = tmp_path / "shared.html"
    path.write_text(compared.to_html(), encoding="utf-8")
    tab.goto(path.as_uri())
    wait_until(tab, "document.documentElement.dataset.ready === 'complete'")
    shown = tab.locator("svg.differences .numbers text").all_text_contents()
    logit = longer.why().contribution
    assert math.fsum(map(_number, shown[1::3])) == pytest.approx(logit, abs=0.006 * len(shown))
    # A row shows a part's contributions at the last token of both prompts.
    first = tab.locator("svg.differences .names [data-id]").first.get_attribute("data-id") or ""
    own = next(
        e for e in longer.edge_list if e.source == first.replace("p7", f"p{compared.positions[7]}")
    )
    assert _number(shown[1]) == pytest.approx(own.logit_contribution, abs=0.006)


def test_models_with_other_layers_have_no_differences(
    tab: Page, compared: TraceComparison, tmp_path: Path
) -> None:
    text = "\n".join(compared.after.to_json_lines()).replace('"nLayers": 4', '"nLayers": 6')
    other = compared.before.compare(januslens.read_trace(text.splitlines()))
    path = tmp_path / "models.html"
    path.write_text(other.to_html(), encoding="utf-8")
    tab.goto(path.as_uri())
    expect(tab.get_by_text(other.different_parts)).to_be_visible()
    expect(tab.locator("svg.differences")).to_have_count(0)
    expect(tab.locator("svg.why")).to_have_count(2)
    tab.set_viewport_size({"width": 1024, "height": 900})
    wait_until(tab, "document.querySelector('svg.heat').clientWidth === 900")  # not the half

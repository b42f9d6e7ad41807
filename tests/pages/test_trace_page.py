"""The page of a trace in a real browser."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from playwright.sync_api import Locator, Page, expect

import januslens
from januslens import _presentation as presentation
from januslens.v1 import common_pb2
from januslens.viewer.html import gradient_page, trace_page
from tests.client import presentation_fixtures as fixtures
from tests.pages.conftest import ELAPSED, PROMPT, Traced, exported, in_sight, traced, wait_until
from tests.pages.models import HOSTILE
from tests.support.axe import serious_findings
from tests.support.server import ServerProcess

STRONGEST = "L3/p7/HEAD_OUTPUT/h2"
VALUE = "L3/p7/MEMORY_VALUE/h2/s3"


def numbers(node: januslens.Node) -> dict[str, str]:
    """Return the numbers of a node as a page shows them."""
    assert node.projection
    return {
        "its probability": _probability(node.projection.target_probability or 0),
        "its logit": _signed(node.projection.target_logit or 0),
        "norm": f"{node.norm:.3g}",
        "entropy": f"{node.projection.entropy_bits:.3g} bits",
    }


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")  # noqa: RUF001 - a real minus sign


def opened(tab: Page, page: Traced, state: str = "") -> Page:
    """Load a page in a state, and wait until it is drawn."""
    tab.goto(f"{page.url}#{state}")
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    return tab


def changed(tab: Page, state: str) -> None:
    """Set another state in the address, as a link does."""
    tab.evaluate(
        """state => new Promise(drawn => {
          const before = location.hash
          addEventListener('hashchange', () => drawn(), { once: true })
          location.hash = state
          if (location.hash === before) drawn()
        })""",
        state,
    )


def chip(tab: Page, node_id: str) -> Locator:
    return tab.locator(f'svg.detail .chip[data-id="{node_id}"]')


def facts(tab: Page) -> dict[str, str]:
    """Return the numbers in the inspector by name."""
    rows = tab.locator(".facts .measures div").all()
    return {r.locator("dt").inner_text(): r.locator("dd").inner_text() for r in rows}


@pytest.mark.parametrize("name", ["demo", "wide", "large"])
def test_overview_cells_equal_the_residuals(
    tab: Page, name: str, request: pytest.FixtureRequest
) -> None:
    page: Traced = request.getfixturevalue(name)
    opened(tab, page)
    cells = tab.locator("svg.overview .cell[data-id]").evaluate_all(
        "cells => cells.map(cell => [cell.dataset.id, cell.getAttribute('aria-label')])"
    )
    assert len(cells) >= (len(page.trace.layers) + 1) * min(8, len(page.trace.prompt_tokens))
    for node_id, label in cells:
        node = page.node(node_id)
        assert node.projection
        assert f", top {node.projection.top[0].token}, rank {node.projection.target_rank} " in label


@pytest.mark.parametrize("name", ["demo", "large"])
def test_inspector_numbers_equal_the_trace(
    tab: Page, name: str, request: pytest.FixtureRequest
) -> None:
    page: Traced = request.getfixturevalue(name)
    opened(tab, page)
    kinds = ("HEAD_OUTPUT", "MEMORY_VALUE", "MLP_VALUE", "RESIDUAL_MID", "BLOCK_OUTPUT", "OTHER")
    for node in [page.trace.nodes_of(kind)[-1] for kind in kinds]:
        changed(tab, f"sel={node.id}")
        section = tab.locator(f'.facts[data-node="{node.id}"]')
        expect(section).to_be_visible()
        shown = facts(tab)
        assert node.projection
        assert numbers(node).items() <= shown.items()
        rank = shown[f"rank of {page.trace.target().target}"].replace("\u2009", "")
        assert rank == f"{node.projection.target_rank} of {page.trace.header.sizes.vocab_size}"
        tops = [entry.token for entry in node.projection.top]
        bottoms = [entry.token for entry in node.projection.bottom]
        rows = section.locator(".scored th").all_inner_texts()
        assert rows == [str(token) for token in (*tops, *bottoms)]
        probabilities = section.locator(".scored tr td:nth-child(3)").all_inner_texts()
        entries = (*node.projection.top, *node.projection.bottom)
        assert probabilities == [_probability(entry.probability) for entry in entries]


def test_shares_and_attention_equal_the_edges(tab: Page, demo: Traced) -> None:
    opened(tab, demo, f"sel={VALUE}")
    edge = next(part.edge for part in demo.trace.parts_of(STRONGEST) if part.node.id == VALUE)
    assert edge
    assert facts(tab)["attention"] == f"{edge.attention:.3f}"
    assert facts(tab)["adds to the logit"] == _signed(edge.logit_contribution or 0)
    assert facts(tab)["share of its sum"] == f"{100 * (edge.share or 0):.0f} %"


def test_first_layer_of_the_answer_is_marked(tab: Page, demo: Traced) -> None:
    opened(tab, demo)
    steps = [
        node
        for node in demo.trace.node_list
        if node.kind in ("BLOCK_INPUT", "RESIDUAL_MID", "BLOCK_OUTPUT") and node.projection
    ]
    first = max(i for i, node in enumerate(steps) if node.projection.target_rank != 0) + 1  # type: ignore[union-attr]  # all have one
    step = "attention" if steps[first].kind == "RESIDUAL_MID" else "MLP"
    story = tab.locator(".story")
    expect(story).to_contain_text(f"Ranked first from layer {steps[first].layer}\u2019s {step}")
    expect(tab.locator(".flag-text")).to_contain_text(
        f"first from L{steps[first].layer}\u2019s {step}"
    )
    best = max(demo.trace.heads(), key=lambda part: part.logit_contribution or 0)
    expect(story).to_contain_text(
        f"adds most of the selected heads: {_signed(best.logit_contribution or 0)} to its logit"
    )


def test_hover_shows_a_tooltip_and_click_selects(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "layers=3")
    chip(tab, STRONGEST).hover()
    tooltip = tab.locator(".tooltip")
    expect(tooltip).to_contain_text("L3 head 2 output")
    chip(tab, STRONGEST).click()
    expect(tab.locator(".facts .where")).to_contain_text("L3 head 2 output")
    assert f"sel={STRONGEST.replace('/', '%2F')}" in tab.url
    expect(chip(tab, STRONGEST)).to_have_class(re.compile("selected"))
    assert tab.locator("svg.detail path.followed").count() >= 2  # itself, and what it is made of
    tab.mouse.move(5, 5)
    expect(tooltip).to_be_hidden()


def test_click_on_a_cell_opens_its_layer(tab: Page, demo: Traced) -> None:
    opened(tab, demo)
    tab.locator('svg.overview .cell[data-id="L1/p7/BLOCK_OUTPUT"]').click()
    expect(tab.locator(".layer h2")).to_have_text("Layer 1 at ␣of (7)")
    tab.locator('svg.overview .cell[data-id="L2/p3/BLOCK_OUTPUT"]').click()
    expect(tab.locator(".layer p.quiet")).to_contain_text("--positions 3")


def test_layer_picture_shows_all_parts(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "layers=2,3")
    for layer in (2, 3):
        graph = demo.trace.layer(layer)
        for kind in (
            "HEAD_OUTPUT",
            "HEAD_QUERY",
            "MEMORY_KEY",
            "MEMORY_VALUE",
            "MLP_KEY",
            "MLP_VALUE",
            "MLP_BIAS",
            "RESIDUAL_MID",
            "BLOCK_OUTPUT",
        ):
            for node in graph.nodes_of(kind):
                assert chip(tab, node.id).count() >= 1, node.id
        negative = [n for n in graph.nodes_of("MLP_VALUE") if (n.activation or 0) < 0]
        assert negative
        for node in negative:  # read through what they suppress
            assert node.projection
            expect(chip(tab, node.id)).to_contain_text(
                f"▾{str(node.projection.bottom[0].token)[:4]}"
            )


def test_head_expands_to_its_w_o_rows(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "layers=3")
    d_head = demo.trace.header.sizes.d_head
    parts = demo.trace.parts_of("L3/p7/ATTENTION_OUTPUT")
    rows = [part for part in parts if part.node.kind is januslens.NodeKind.ATTENTION_NEURON]
    own = [part for part in rows if (part.node.neuron or 0) // d_head == 2]
    assert 0 < len(own) < len(rows)
    shown = tab.locator('svg.detail .chip[data-id*="/ATTENTION_NEURON/"]')
    expect(shown).to_have_count(0)
    toggle = tab.locator('svg.detail .toggle[data-head="3.2"]')
    expect(toggle).to_have_text(f"▸ {len(own)} rows of W_O")
    toggle.click()
    expect(shown).to_have_count(len(own))
    for part in own:
        negative = (part.node.activation or 0) < 0  # read through what it suppresses
        assert part.node.projection
        read = part.node.projection.bottom if negative else part.node.projection.top
        expect(chip(tab, part.node.id)).to_contain_text(str(read[0].token)[:4])
    numbers = tab.locator("svg.detail .texts .number").all_text_contents()
    assert part_share(own[0]) in numbers
    assert "heads=3.2" in tab.url
    toggle.focus()
    tab.keyboard.press("Enter")
    expect(shown).to_have_count(0)
    other = next(part.node for part in rows if part not in own)  # chosen from afar, it is shown
    changed(tab, "layers=3&sel=L3/p7/ATTENTION_OUTPUT")
    tab.locator(f'.node-links .node-link[data-id="{other.id}"]').click()
    expect(chip(tab, other.id)).to_have_class(re.compile("selected"))


def part_share(part: januslens.Part) -> str:
    share = 100 * (part.edge.share if part.edge and part.edge.share else 0)
    return f"{share:.{0 if abs(share) >= 9.95 else 1}f} %".replace("-", "−")  # noqa: RUF001


@pytest.mark.parametrize("name", ["demo", "large"])
def test_head_matrix_equals_the_contributions(
    tab: Page, name: str, request: pytest.FixtureRequest
) -> None:
    page: Traced = request.getfixturevalue(name)
    opened(tab, page, "layers=0")
    tab.get_by_role("button", name="heads", exact=True).click()
    expect(tab.locator("svg.overview")).to_be_hidden()
    added = {
        part.node.id: part.edge.logit_contribution
        for part in page.trace.heads()
        if part.edge and part.edge.logit_contribution is not None
    }
    cells = tab.locator("svg.heads .head")
    expect(cells).to_have_count(len(added))
    largest = max(map(abs, added.values()))
    shown = {cell.get_attribute("data-id"): cell for cell in cells.all()}
    for node_id in list(added)[:4]:
        text = f"{added[node_id]:+.{3 if largest < 0.1 else 2}f}".replace("-", "−")  # noqa: RUF001
        expect(shown[node_id].locator(".number")).to_have_text(text)
    best = max(added, key=lambda node_id: abs(added[node_id]))
    deepest = tab.evaluate("""() => [...document.querySelectorAll('svg.heads .head rect')]
      .reduce((a, b) => +a.getAttribute('fill-opacity') > +b.getAttribute('fill-opacity') ? a : b)
      .parentElement.dataset.id""")
    assert deepest == best
    shown[best].click()
    expect(tab.locator(".layer h2")).to_contain_text(f"Layer {page.node(best).layer} at")
    expect(chip(tab, best)).to_be_in_viewport()
    expect(tab.locator(f'.facts[data-node="{best}"]')).to_be_visible()


def test_selection_flows_through_the_layers(tab: Page, demo: Traced) -> None:
    """Above the node, widths are its share of the residual, below it the parts' shares of it."""
    head = "L2/p7/HEAD_OUTPUT/h3"
    opened(tab, demo, f"layers=2,3&sel={head}")
    bias = share(demo, "L2/p7/ATTENTION_BIAS")
    after = share(demo, head) * (1 - bias) * share(demo, "L2/p7/ATTENTION_OUTPUT")
    after *= share(demo, "L2/p7/RESIDUAL_MID")
    rail = 'svg.detail[aria-label^="Layer 3"] .rail'
    drawn = float(tab.locator(f"{rail}-flow path").first.get_attribute("stroke-width") or 0)
    whole = float(tab.locator(f"{rail} > rect").first.get_attribute("height") or 0)
    assert drawn / whole == pytest.approx(abs(after), abs=1e-4)
    changed(tab, "layers=2,3&sel=p7/PREDICTION")
    residual = share(demo, "L3/p7/RESIDUAL_MID") * share(demo, "L2/p7/BLOCK_OUTPUT")
    made = tab.locator('svg.detail[aria-label^="Layer 2"] [data-flow="L2/p7/MLP_OUTPUT"]')
    drawn = float(made.get_attribute("stroke-width") or 0)
    assert drawn / (2 + 16 * share(demo, "L2/p7/MLP_OUTPUT")) == pytest.approx(residual, abs=1e-4)


def share(page: Traced, node_id: str) -> float:
    """The share of the node in its sum."""
    return next(
        edge.share or 0
        for edge in page.trace.edge_list
        if edge.source == node_id and edge.kind is januslens.EdgeKind.PART
    )


def test_search_finds_every_matching_node(tab: Page, demo: Traced) -> None:
    opened(tab, demo)
    tab.keyboard.press("/")
    tab.keyboard.type("Tokyo")
    saying = {
        node.id
        for node in (*demo.trace.node_list, *demo.overview.node_list)
        if node.projection
        and any(
            "Tokyo" in str(entry.token) for entry in (*node.projection.top, *node.projection.bottom)
        )
    }
    expect(tab.locator(".found h2")).to_have_text(
        f"{len(saying)} nodes have “Tokyo” among their tokens"
    )
    tab.keyboard.press("Tab")
    first = tab.locator(".found .node-link").first
    found = first.get_attribute("data-id")
    assert found in saying
    first.click()
    expect(tab.locator(f'.facts[data-node="{found}"]')).to_be_visible()


def test_filters_hide_parts_and_report_their_number(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "layers=3")
    neurons = demo.trace.layer(3).neurons()
    values = tab.locator('svg.detail .chip[data-id*="/MLP_VALUE/"]')
    expect(values).to_have_count(len(neurons))
    tab.get_by_label("Smallest share").select_option("2")
    expect(values).to_have_count(sum(abs(part.share or 0) >= 0.02 for part in neurons))
    tab.get_by_label("Smallest share").select_option("")
    tab.get_by_label("Sign").select_option("-")
    expect(values).to_have_count(sum((part.share or 0) < 0 for part in neurons))
    tab.get_by_role("button", name="MLP", exact=True).click()
    expect(values).to_have_count(0)
    assert "hide=mlp" in tab.url


def test_pinned_nodes_are_compared(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "layers=3")
    chip(tab, STRONGEST).click()
    tab.keyboard.press("p")
    chip(tab, VALUE).click(modifiers=["Control"])
    table = tab.locator(".comparison")
    expect(table.locator("thead th")).to_have_count(2)
    norms = table.locator("tr", has=tab.get_by_role("rowheader", name="norm", exact=True))
    shown = [f"{demo.node(node_id).norm:.3g}" for node_id in (STRONGEST, VALUE)]
    assert norms.locator("td").all_inner_texts() == shown
    table.get_by_label("unpin").first.click()
    expect(table.locator("thead th")).to_have_count(2)  # the selected one beside the other


@pytest.mark.parametrize("name", ["demo", "large"])
def test_contribution_tree_has_the_lines_of_the_client(
    tab: Page, name: str, request: pytest.FixtureRequest
) -> None:
    page: Traced = request.getfixturevalue(name)
    opened(tab, page)
    tab.keyboard.press("f")
    lines = list(presentation.contribution_lines(page.trace.why(), page.trace))
    links = tab.locator(".path .node-link").all()
    listed = [line for line in lines if line.part]
    assert [link.get_attribute("data-id") for link in links] == [
        line.part.node.id for line in listed if line.part
    ]
    names = [link.locator(".what").inner_text().replace("\u2019", "'") for link in links]
    assert names == [line.name for line in listed]
    rests = [text.replace("\u2212", "-") for text in tab.locator(".path .rest").all_inner_texts()]
    assert rests == [
        f"{presentation.signed(line.contribution)} rest" for line in lines if not line.part
    ]


@pytest.mark.parametrize("name", ["demo", "large"])
def test_why_figure_adds_up_to_the_logit(
    tab: Page, name: str, request: pytest.FixtureRequest
) -> None:
    page: Traced = request.getfixturevalue(name)
    opened(tab, page)
    tree = page.trace.why(at_most=10)
    shown = {
        row.get_attribute("data-id"): row.locator(".amount").text_content() or ""
        for row in tab.locator("svg.why .parts > g:not(.rest)").all()
    }
    below = [part for sublayer in tree.parts for part in sublayer.parts or (sublayer,)]
    parts = {part.node.id: part.contribution for part in below}
    assert shown == {node_id: _signed(value) for node_id, value in parts.items()}
    rests = tab.locator("svg.why .parts > g.rest .amount").all_text_contents()
    texts = [*shown.values(), *rests]
    total = math.fsum(float(text.replace("\u2212", "-")) for text in texts)
    assert total == pytest.approx(tree.contribution, abs=0.005 * (len(shown) + len(rests) + 1))
    expect(tab.locator("svg.why .answer-chip")).to_contain_text(_signed(tree.contribution))


def test_why_figure_selects_parts_and_sits_beside_the_overview(tab: Page, demo: Traced) -> None:
    opened(tab, demo)
    part = tab.locator("svg.why .parts > g:not(.rest)").first
    part.focus()
    tab.keyboard.press("Enter")
    expect(part).to_have_class(re.compile("selected"))
    node_id = part.get_attribute("data-id")
    expect(tab.locator(f'.facts[data-node="{node_id}"]')).to_be_visible()
    tab.set_viewport_size({"width": 1920, "height": 1000})
    wait_until(
        tab,
        """() => {
      const [why, overview, heads] = ['svg.why', 'svg.overview', 'svg.heads'].map((picture) =>
        document.querySelector(picture).getBoundingClientRect())
      return why.right < overview.left && overview.top - why.top < 80
        && heads.top > why.bottom && heads.right < overview.left
    }""",
    )
    head = tab.locator('svg.heads [data-id="L3/p7/HEAD_OUTPUT/h2"]')
    head.click()
    expect(tab.locator('.facts[data-node="L3/p7/HEAD_OUTPUT/h2"]')).to_be_visible()


def test_page_works_with_the_keyboard_alone(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "sel=L2/p7/BLOCK_OUTPUT")
    tab.locator('svg.overview .cell[data-id="L2/p7/BLOCK_OUTPUT"]').focus()
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")
    expect(tab.locator('.facts[data-node="L3/p7/BLOCK_OUTPUT"]')).to_be_visible()
    tab.keyboard.press("[")  # its strongest source
    expect(tab.locator(".facts .where")).to_contain_text("residual after attention")
    tab.keyboard.press("]")
    expect(tab.locator(".facts .where")).to_contain_text("residual after the block")
    tab.keyboard.press("?")
    expect(tab.get_by_role("dialog")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.get_by_role("dialog")).to_be_hidden()
    tab.keyboard.press("Escape")
    assert "sel=" not in tab.url


def test_focused_part_is_not_covered_by_the_facts_of_a_narrow_window(
    tab: Page, large: Traced
) -> None:
    opened(tab, large)
    tab.set_viewport_size({"width": 1024, "height": 700})
    tab.locator("svg.overview .cell").last.focus()
    for key in ("Enter", "ArrowUp", "ArrowUp", "Enter"):
        tab.keyboard.press(key)
    facts = tab.locator(".inspector.has-selection")
    expect(facts).to_be_in_viewport()
    focused, covering = tab.locator("svg.overview :focus").bounding_box(), facts.bounding_box()
    assert focused
    assert covering
    assert focused["y"] >= 0
    assert focused["y"] + focused["height"] <= covering["y"]
    tab.keyboard.press("Escape")
    expect(tab.locator(".inspector.has-selection")).to_have_count(0)
    expect(tab.locator("svg.overview :focus")).to_have_attribute("tabindex", "0")


def test_table_equals_the_trace_and_sorts(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "layers=3&view=table")
    rows = tab.locator("table.nodes tbody tr")
    graph = demo.trace.layer(3)
    here = sum(node.position == 7 for node in graph.node_list)
    expect(rows).to_have_count(here)  # without the embedding, which layer 0 shows
    tab.get_by_role("button", name="logit", exact=True).click()
    logits = [e.logit_contribution for e in graph.edge_list if e.logit_contribution is not None]
    expect(rows.first.locator("td").nth(2)).to_have_text(_signed(max(logits)))


def test_arrow_keys_move_between_the_rows_of_the_table(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "layers=3&view=table")
    last = demo.trace.nodes_of("BLOCK_OUTPUT")[-1].id
    expect(tab.locator(f'table.nodes tr[data-id="{last}"]')).to_be_attached()  # all rows are there
    buttons = tab.locator("table.nodes tbody button")
    tab.locator("table.nodes thead button").last.press("Tab")
    for key, row in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", -1), ("Home", 0)):
        tab.locator("table.nodes :focus").press(key)
        focused = buttons.nth(row)
        expect(focused).to_be_focused()
        expect(focused).to_be_in_viewport()
        expect(tab.locator("table.nodes tbody [tabindex='0']")).to_have_count(1)
    tab.locator("table.nodes :focus").press("ArrowDown")
    tab.locator("table.nodes :focus").press("Enter")
    expect(tab.locator("table.nodes tr[aria-current] button")).to_be_focused()
    tab.keyboard.press("Tab")
    expect(tab.locator("table.nodes :focus")).to_have_count(0)


def test_table_is_in_the_order_of_the_computation_and_shows_the_selection(
    tab: Page, demo: Traced
) -> None:
    opened(tab, demo, "layers=3&view=table")
    rows = tab.locator("table.nodes tbody tr")
    last = f"{demo.trace.nodes_of('BLOCK_OUTPUT')[-1].id}"
    expect(tab.locator(f'table.nodes tr[data-id="{last}"]')).to_be_attached()  # all rows are there
    order = rows.evaluate_all("rows => rows.map(row => row.dataset.id)")
    assert order[0] == "L3/p7/ATTENTION_INPUT"
    sums = [f"L3/p7/{kind}" for kind in ("ATTENTION_OUTPUT", "RESIDUAL_MID", "MLP_OUTPUT")]
    places = [order.index(node_id) for node_id in (VALUE, STRONGEST, *sums, last)]
    assert places == sorted(places)
    part = tab.locator('svg.why .parts [data-id^="L3/p7/HEAD_OUTPUT"]').first
    selected = part.get_attribute("data-id")
    part.click()  # between its name and its number
    row = tab.locator("table.nodes tr.selected")
    expect(row).to_have_attribute("data-id", selected or "")
    assert row.get_attribute("aria-current") == "true"
    tab.locator(".story [data-id]").first.click()
    expect(tab.locator("table.nodes tr.selected")).to_be_in_viewport()


def test_link_restores_the_view(tab: Page, demo: Traced) -> None:
    opened(tab, demo, f"sel={VALUE}&layers=2,3&min=5&theme=dark&path=1")
    assert tab.locator(".layer").count() == 2
    expect(tab.locator(f'.facts[data-node="{VALUE}"]')).to_be_visible()
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    expect(tab.get_by_label("Smallest share")).to_have_value("5")


def test_themes_differ_and_printing_is_light(tab: Page, demo: Traced) -> None:
    opened(tab, demo)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(colour)
    tab.emulate_media(color_scheme="dark")
    dark = tab.evaluate(colour)
    assert dark != light
    tab.emulate_media(color_scheme="dark", media="print")
    assert tab.evaluate(colour) == light


def test_printed_page_has_complete_pictures(tab: Page, demo: Traced) -> None:
    opened(tab, demo, "layers=3")
    drawn = tab.evaluate("document.querySelector('svg.detail').clientWidth")
    tab.set_viewport_size({"width": 718, "height": 1000})  # A4 within Chromium's margins
    tab.emulate_media(media="print")
    for picture in ("svg.overview", "svg.detail"):
        box = tab.locator(picture).bounding_box()
        assert box
        assert box["width"] < drawn
        assert box["x"] + box["width"] <= 718


def test_forced_colours_show_pressed_buttons(tab: Page, demo: Traced) -> None:
    tab.emulate_media(forced_colors="active")
    opened(tab, demo, "hide=mlp")
    background = "element => getComputedStyle(element).backgroundColor"
    on = tab.get_by_role("button", name="attention", exact=True).evaluate(background)
    assert on != tab.get_by_role("button", name="MLP", exact=True).evaluate(background)
    bars = tab.locator(".scored .bar").first.evaluate(background)
    assert bars != tab.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_reports_nothing_serious(tab: Page, demo: Traced, theme: str) -> None:
    opened(tab, demo)
    for state in (
        "",
        f"sel={VALUE}&pin={STRONGEST}&q=Tokyo&names=L3.h2%09capitals%09a+note",
        "view=table",
        "map=heads&heads=3.2",
    ):
        changed(tab, f"{state}&theme={theme}")
        assert serious_findings(tab) == [], state


def test_nothing_overflows_the_window(tab: Page, large: Traced) -> None:
    opened(tab, large)
    for width in (380, 800, 1100, 1900):
        tab.set_viewport_size({"width": width, "height": 900})
        expect(tab.locator("svg.overview")).to_be_visible()
        wait_until(tab, "document.documentElement.scrollWidth <= window.innerWidth")


def test_hostile_tokens_are_text(tab: Page, large: Traced) -> None:
    opened(tab, large, "layers=0,5,11")
    assert tab.locator("main b, main script, h1 b, aside b").count() == 0
    changed(tab, "pos=1")  # the title shows the tokens around the selected one
    prompt = tab.locator("h1").inner_text()
    assert "<script>alert(1)</script>" in prompt
    assert "<b>bold</b>" in prompt
    shown = [str(token) for token in large.trace.prompt_tokens]
    assert any("<U+" in label for label in shown)
    assert any("<0x" in label for label in shown)
    for hidden in "\u202e\u200b\u200d\n\t":
        assert hidden in "".join(HOSTILE)
        labels = tab.locator("svg text, bdi").all_text_contents()
        assert not any(hidden in label for label in labels)


def test_exported_json_equals_the_stream(tab: Page, demo: Traced, tmp_path: Path) -> None:
    opened(tab, demo)
    with exported(tab, "JSON Lines", tmp_path / "trace.jsonl").open(encoding="utf-8") as lines:
        assert januslens.read_trace(lines) == demo.trace


@pytest.mark.parametrize(("size", "millimetres"), [("column", 85), ("page", 170)])
def test_exported_figures_stand_alone(
    tab: Page, demo: Traced, tmp_path: Path, size: str, millimetres: int
) -> None:
    opened(tab, demo)
    before = tab.locator("svg.overview").get_attribute("width")
    path = exported(tab, "SVG", tmp_path / "figure.svg", size=size, panels=2)
    svg = path.read_text(encoding="utf-8")
    assert "var(--" not in svg
    assert re.match(rf'<svg [^>]*width="{millimetres}.00mm" height="[\d.]+mm" viewBox="0 0 ', svg)
    texts = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    for shown in (PROMPT, "␣Tokyo", "model demo", "Where the logit of", "Residual stream by token"):
        assert shown in re.sub("[\u2066-\u2069]", "", texts)
    assert "Layer 3" not in texts  # the third panel was not chosen
    panels = re.findall(r'<svg [^>]*class="picture[^>]*>', svg)
    widths = [float(re.search(r' width="([\d.]+)"', panel)[1]) for panel in panels]  # type: ignore[index]  # all have one
    assert min(widths) > 0.9 * max(widths)
    assert tab.locator("svg.overview").get_attribute("width") == before
    png = exported(tab, "PNG", tmp_path / "figure.png", size=size, panels=1).read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20]) == round(millimetres / 25.4 * 300)


@pytest.mark.parametrize("size", ["column", "page"])
def test_texts_of_a_figure_for_a_paper_are_six_points_and_inside_of_it(
    tab: Page, large: Traced, tmp_path: Path, size: str
) -> None:
    opened(tab, large, "layers=5")
    path = exported(tab, "SVG", tmp_path / "figure.svg", size=size)
    tab.goto(path.as_uri())
    assert tab.locator("svg > svg").count() == 3
    points = tab.evaluate(
        """() => {
          const figure = document.documentElement
          const pixel = figure.getBoundingClientRect().width / figure.viewBox.baseVal.width
          const cell = figure.querySelector('.cells text')
          return parseFloat(getComputedStyle(cell).fontSize) * pixel * 0.75
        }"""
    )
    assert points == pytest.approx(6, abs=0.05)
    cut = tab.evaluate(
        """() => {
          const room = document.documentElement.getBoundingClientRect()
          const outside = ({ left, right }) => left < room.left - 1 || right > room.right + 1
          const texts = [...document.querySelectorAll('text')]
          return texts.filter((text) => outside(text.getBoundingClientRect()))
            .map((text) => text.textContent)
        }"""
    )
    assert cut == []


def test_slide_has_the_shape_of_a_slide(tab: Page, demo: Traced, tmp_path: Path) -> None:
    opened(tab, demo)
    svg = exported(tab, "SVG", tmp_path / "slide.svg", size="slide").read_text(encoding="utf-8")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box
    _, _, width, height = map(float, box[1].split())
    assert width / height == pytest.approx(16 / 9)


def test_panels_of_a_slide_are_beside_each_other_where_they_fill_it(
    tab: Page, large: Traced, tmp_path: Path
) -> None:
    opened(tab, large, "layers=5")
    path = exported(tab, "SVG", tmp_path / "slide.svg", size="slide")
    tab.goto(path.as_uri())
    places = tab.evaluate(
        """() => {
          const slide = document.documentElement.getBoundingClientRect()
          return [...document.querySelectorAll('svg > svg')].map((panel) => {
            const { left, top, right, bottom } = panel.getBoundingClientRect()
            return [left, right].map((x) => x / slide.width)
              .concat([top, bottom].map((y) => y / slide.height))
          })
        }"""
    )
    assert len(places) == 3
    for i, (left, right, top, bottom) in enumerate(places):
        for other_left, other_right, other_top, other_bottom in places[:i]:
            beside = left >= other_right or right <= other_left
            assert beside or top >= other_bottom or bottom <= other_top
    assert max(place[1] for place in places) - min(place[0] for place in places) > 0.6
    assert max(place[3] for place in places) <= 1


def pages_of(pdf: bytes) -> list[tuple[float, float]]:
    """The widths and heights of a PDF's pages, in points."""
    boxes = re.findall(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)\s*\]", pdf)
    assert len(boxes) == len(re.findall(rb"/Type\s*/Page\b", pdf))
    return [(float(width), float(height)) for width, height in boxes]


def test_pdf_is_one_sheet_of_the_figure(tab: Page, demo: Traced) -> None:
    opened(tab, demo)
    tab.evaluate("window.print = () => {}")  # a browser without a window has no dialog
    tab.get_by_role("button", name="Export", exact=True).click()
    tab.get_by_label("Size").select_option("page")
    tab.get_by_role("button", name="PDF", exact=True).click()
    expect(tab.locator(".figure-sheet")).to_have_count(1)
    wait_until(tab, "document.adoptedStyleSheets.length > 0")
    [(width, height)] = pages_of(tab.pdf(prefer_css_page_size=True))
    assert width == pytest.approx(170 / 25.4 * 72, abs=1)
    assert height > width / 2
    expect(tab.locator(".figure-sheet")).to_have_count(0)  # gone after printing


def test_printed_page_has_no_blank_or_cut_sheets(tab: Page, large: Traced) -> None:
    opened(tab, large, "layers=5")
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 703, "height": 1032})  # A4 without the margins, in pixels
    sheet = 1032
    for picture in ("svg.why", "svg.overview", "svg.detail"):
        box = tab.locator(picture).bounding_box()
        assert box
        assert box["width"] <= 703
        assert 40 < box["height"] < sheet
    tall = tab.evaluate("document.documentElement.scrollHeight")
    assert len(pages_of(tab.pdf(format="A4"))) <= tall / sheet + 3


def test_exported_picture_includes_unlabelled_columns(
    tab: Page, wide: Traced, tmp_path: Path
) -> None:
    opened(tab, wide)
    labelled = tab.locator("svg.overview .cell").count()
    exported(tab, "SVG", tmp_path / "svg")
    svg = (tmp_path / "svg").read_text(encoding="utf-8")
    outlines = re.findall(r'class="heat-\d" d="([^"]*)"', svg)
    assert len(outlines) == 7  # one a colour
    assert sum(outline.count("M") for outline in outlines) == 20 * 5 - labelled > 0


def test_selection_does_not_move_elements(tab: Page, demo: Traced) -> None:
    """Only classes change, and neither the place nor the text of an element."""
    opened(tab, demo, "layers=3")
    tab.evaluate("""() => {
      window.touched = new Set()
      const seen = new MutationObserver((changes) =>
        changes.forEach((change) => window.touched.add(change.attributeName ?? change.type)))
      for (const picture of document.querySelectorAll('svg.picture g:not(.flow, .rail-flow)'))
        seen.observe(picture, { attributes: true, childList: true, characterData: true })
    }""")
    chip(tab, STRONGEST).click()
    expect(chip(tab, STRONGEST)).to_have_class(re.compile("selected"))
    assert set(tab.evaluate("[...window.touched]")) <= {"class", "tabindex"}


def test_digits_of_a_right_to_left_prompt_keep_their_order(
    tab: Page, demo: Traced, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in demo.trace.to_json_lines()]
    texts = ["عاصمة", " اليابان", " ", "2", "0", "2", "4", " هي"]
    for token, text in zip(lines[0]["header"]["promptTokens"], texts, strict=True):
        token["text"] = text
    trace = januslens.read_trace(map(json.dumps, lines))
    path = tmp_path / "arabic.html"
    path.write_text(trace.to_html(), encoding="utf-8")
    opened(tab, Traced(trace, trace, path))
    lefts = tab.locator("h1 .prompt > *").evaluate_all(
        "all => all.map(token => token.getBoundingClientRect().left)"
    )
    assert lefts[3:7] == sorted(lefts[3:7])
    assert lefts[0] > lefts[1] > max(lefts[3:7]) > lefts[7]


def test_filter_draws_arcs_anew_and_leaves_the_cells(tab: Page, demo: Traced) -> None:
    opened(tab, demo)
    tab.evaluate("""() => {
      const seen = (name, kinds) => new MutationObserver((all) => { window[name] += all.length })
        .observe(document.querySelector(`svg ${kinds}`), { subtree: true, attributes: true })
      window.cells = window.arcs = window.layer = 0
      seen('cells', '.cells'), seen('arcs', '.arcs'), seen('layer', '.ribbons')
    }""")
    changed(tab, "arcs=share")
    assert tab.evaluate("[arcs > 0, cells, layer]") == [True, 0, 0]


def test_page_without_overview_shows_the_traced_positions(
    tab: Page, demo: Traced, tmp_path: Path
) -> None:
    path = tmp_path / "alone.html"
    path.write_text(demo.trace.to_html(), encoding="utf-8")
    opened(tab, Traced(demo.trace, demo.trace, path))
    assert tab.locator("svg.overview .cell[data-id]").count() == 5
    assert tab.locator("svg.overview .cell.empty").count() == 35


def test_page_size_and_drawing_time_are_bounded(tab: Page, large: Traced, wide: Traced) -> None:
    """Generous bounds: about 0.2 s and 0.05 s are measured on an idle machine."""
    assert large.path.stat().st_size < 1.5e6
    for page in (large, wide):
        opened(tab, page)
        drawn = tab.evaluate("performance.getEntriesByName('januslens-drawn')[0].startTime")
        assert drawn < 5_000
        for state in ("layers=1", "layers=3&path=1", "layers=3&q=a", "layers=3&min=5"):
            assert tab.evaluate(ELAPSED, state) < 2_000


def test_named_head_keeps_its_name_in_labels_link_and_exports(
    tab: Page, demo: Traced, tmp_path: Path
) -> None:
    """The name of a head is given with the keyboard; the texts are hostile."""
    name, note = 'city "mover" <b>', "writes the city; <img src=x onerror=alert(1)>\u202e"
    opened(tab, demo, f"layers=3&sel={STRONGEST}")
    tab.keyboard.press("n")
    tab.keyboard.type(name)
    tab.keyboard.press("Tab")
    tab.keyboard.type(note)
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # saves
    shown = f"L3 head 2 “{name}”"
    expect(tab.locator(".facts .where")).to_have_text(f"{shown} output, at ␣of (7)")
    expect(tab.locator(".facts .note")).to_have_text(note.replace("\u202e", ""))
    expect(tab.locator(".story")).to_contain_text(f"{shown} adds most")
    part = tab.locator(f'svg.why .parts [data-id="{STRONGEST}"] .name')
    expect(part).to_have_text(re.compile(re.escape(shown[:14])))
    expect(tab.locator("svg.detail .strong", has_text=name[:8])).to_have_count(1)
    link = tab.url
    tab.goto("about:blank")
    tab.goto(f"{link}&view=table&map=heads")
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    row = tab.locator(f'table.nodes tr[data-id="{STRONGEST}"]')
    expect(row.get_by_role("rowheader")).to_have_text(f"{shown} output")
    cell = tab.locator(f'svg.heads [data-id="{STRONGEST}"]')
    expect(cell.locator("text").first).to_have_text(re.compile(r"^city"))
    expect(tab.locator(".names .node-link")).to_contain_text(shown)
    assert tab.locator("main b, aside b, main img, aside img").count() == 0
    svg = exported(tab, "SVG", tmp_path / "named.svg", size="column").read_text(encoding="utf-8")
    texts = [text or "" for text in ET.fromstring(svg).itertext()]  # noqa: S314 - our own
    assert f"{shown}: writes the city;" in " ".join(texts)
    tab.get_by_role("button", name="Edit name or note").click()
    tab.get_by_role("button", name="Remove", exact=True).click()
    expect(tab.locator(".names")).to_have_count(0)
    assert "names=" not in tab.url


def test_headers_name_the_weights_and_the_limited_layers(
    tab: Page, demo: Traced, server_address: str, tmp_path: Path
) -> None:
    with januslens.Client(server_address) as client:
        gradient = client.gradient_lens(PROMPT, " Paris")
    limit = common_pb2.LayerLevel(
        layer=1,
        level=common_pb2.LEVEL_SUBLAYERS,
        reason="unknown mixer",
        sublayers=[common_pb2.Sublayer(module="mamba", kind=common_pb2.SUBLAYER_KIND_STATE_SPACE)],
    )
    trace, factors = copy.deepcopy((demo.trace.responses, gradient.responses))
    for header in (trace[0].header, factors[0].header):
        header.provenance.quantization = "GGUF Q4_K"
        header.provenance.lora = "rank 8 on q_proj, over the model <b>"
        header.limited_layers.append(limit)
    for html in (
        trace_page(trace, (), demo.trace.prompt_tokens),
        gradient_page(factors, {}, gradient.prompt_tokens),
    ):
        path = tmp_path / "limited.html"
        path.write_text(html, encoding="utf-8")
        opened(tab, Traced(demo.trace, demo.trace, path))
        line = tab.locator(".provenance")
        expect(line).to_contain_text("float32, from GGUF Q4_K · cpu · with a LoRA of rank 8 on q_")
        expect(tab.locator(".story")).to_contain_text(
            "Layer 1: residual stream, mamba (state space) only (unknown mixer)."
        )


def test_heads_of_a_mixer_are_rows_of_its_panel(tab: Page, demo: Traced, tmp_path: Path) -> None:
    stream = fixtures.stream_of(fixtures.with_mixer_heads())
    stream[0].header.limited_layers.extend(fixtures.sublayers(0))
    path = tmp_path / "mixer.html"
    path.write_text(trace_page(stream, (), demo.trace.prompt_tokens), encoding="utf-8")
    opened(tab, Traced(demo.trace, demo.trace, path))
    detail = tab.locator("svg.detail")
    for text in ("Mixer", "2 heads", "head 0", "head output", "after the mixer", "75 %", "25 %"):
        expect(detail.get_by_text(text, exact=True).first).to_be_visible()
    for absent in ("Attention", "query", "source"):
        expect(detail.get_by_text(absent, exact=True)).to_have_count(0)
    chips = [detail.locator(f'[data-id="L0/p1/MIXER_HEAD/h{head}"].chip') for head in (0, 1)]
    upper, lower = (chip.bounding_box() for chip in chips)
    assert upper
    assert lower
    assert upper["height"] <= lower["y"] - upper["y"] < 2 * upper["height"]
    keys = tab.locator("svg.overview .legend text").all_text_contents()
    assert keys[-3:] == ["mixer", "MLP", "residual (width: norm)"]


def test_sublayers_that_a_block_does_not_have_are_not_drawn(
    tab: Page, demo: Traced, tmp_path: Path
) -> None:
    path = tmp_path / "one.html"
    for layer, titles in (
        (fixtures.with_one_sublayer(), ["MLP"]),
        (fixtures.with_mixer(), ["Mixer", "MLP"]),
    ):
        html = trace_page(fixtures.stream_of(layer), (), demo.trace.prompt_tokens)
        path.write_text(html, encoding="utf-8")
        tab.goto("about:blank")
        opened(tab, Traced(demo.trace, demo.trace, path))
        assert tab.locator("svg.detail text.title").all_text_contents() == titles
    for text in ("not divided into heads", "not divided into neurons"):
        expect(tab.locator("svg.detail").get_by_text(text)).to_be_visible()
    for absent in ("query", "neuron"):
        expect(tab.locator("svg.detail").get_by_text(absent, exact=True)).to_have_count(0)


def test_bytes_of_one_character_are_text_in_the_title(
    tab: Page, random_server: ServerProcess, tmp_path: Path
) -> None:
    text = "عاصمة 🐱👩\u200d🚀 or ص"  # most characters are two to four tokens
    with januslens.Client(random_server.address) as client:
        ids = [token.id for token in client.tokenize(text, model="random")][:-1]  # cuts the last
        page = traced(client, tmp_path / "bytes.html", ids, model="random")
    assert len(ids) > len(text)
    opened(tab, page)
    expect(tab.locator("h1 .prompt")).to_have_text(f"{text[:-1]}<0xD8>")
    expect(tab.locator("h1 .prompt .selected")).to_have_text("<0xD8>")
    assert tab.title() == f"{text[:-1]}\ufffd · Januslens".replace("\u200d", "<U+200D>")


def test_labels_of_rows_stay_when_a_narrow_window_scrolls(tab: Page, demo: Traced) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    opened(tab, demo)
    box = tab.locator(".overview-box").first
    assert box.evaluate("box => box.scrollLeft") > 0
    cell = tab.locator('svg.overview .cell[data-id="L1/p7/BLOCK_OUTPUT"]').bounding_box()
    label = box.locator(".row-labels span", has_text="L1").bounding_box()
    rank = box.locator(".ranks text").first.bounding_box()
    assert cell
    assert label
    assert rank
    assert label["y"] == pytest.approx(cell["y"], abs=1)
    assert 0 <= label["x"] < label["x"] + label["width"] < cell["x"]
    assert rank["x"] + rank["width"] <= 390
    box.locator(".row-labels span", has_text="L1").click()
    expect(tab.locator(".layer h2", has_text="Layer 1")).to_be_visible()


@pytest.mark.parametrize("width", [390, 768, 1440])
@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (f"layers=3&sel={VALUE}", "svg.detail .chip.selected"),
        (f"layers=2,3&sel={STRONGEST.replace('L3', 'L2')}", "svg.detail .chip.selected"),
        (f"layers=3&view=table&sel={VALUE}", "table.nodes tr.selected th"),
        ("layers=1&sel=L1/p3/BLOCK_OUTPUT", "svg.overview .cell.selected"),  # not traced in full
    ],
)
def test_a_link_shows_its_selection(
    tab: Page, demo: Traced, width: int, state: str, shown: str
) -> None:
    tab.set_viewport_size({"width": width, "height": 700})
    opened(tab, demo, state)
    expect(tab.locator(shown)).to_be_in_viewport()  # the table adds its later rows after a while
    assert in_sight(tab, tab.locator(shown))


def test_saved_names_are_a_part_of_the_page(tab: Page, demo: Traced, tmp_path: Path) -> None:
    path = tmp_path / "named.html"
    names = "L3.h2\tcapitals</script>\t"
    trace = demo.trace
    html = trace_page(trace.responses, (), trace.prompt_tokens, names=names)
    path.write_text(html, encoding="utf-8")
    opened(tab, Traced(trace, trace, path))
    expect(tab.locator(".story")).to_contain_text("L3 head 2 “capitals</script>” adds most")
    changed(tab, "names=")
    expect(tab.locator(".story")).to_contain_text("L3 head 2 adds most")

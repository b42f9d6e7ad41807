"""The page of a sweep: its numbers equal those of the client, and it says what they are."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

import januslens
from januslens import InterventionEffects, SweepOver, zero
from tests.pages.conftest import PROMPT, in_sight
from tests.support.axe import serious_findings


@pytest.fixture(scope="module")
def effects(server_address: str) -> InterventionEffects:
    with januslens.Client(server_address) as client:
        sweep = SweepOver(zero("MLP_OUTPUT"), by=["layer", "position"])
        return client.intervene(PROMPT, target=" Tokyo", sweep=sweep)


@pytest.fixture
def opened(
    tab: Page, effects: InterventionEffects, tmp_path_factory: pytest.TempPathFactory
) -> Page:
    path = tmp_path_factory.mktemp("effects") / "effects.html"
    path.write_text(effects.to_html(), encoding="utf-8")
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    return tab


def test_cells_equal_the_effects_and_are_bold_where_the_rank_changes(
    opened: Page, effects: InterventionEffects
) -> None:
    [before] = effects.before
    changed = 0
    for effect in effects.effects:
        [after] = effect.after
        cell = opened.locator(f'.heat [data-id="L{effect.layer}|position {effect.position}"]')
        text = cell.locator(".line-0")
        shown = (text.text_content() or "").replace("\N{MINUS SIGN}", "-")
        assert float(shown) == pytest.approx(after.logit - before.logit, abs=0.0051)
        bold = after.rank != before.rank
        assert (text.evaluate("t => getComputedStyle(t).fontWeight") == "700") == bold
        changed += bold
    assert 0 < changed < len(effects.effects)
    expect(opened.locator(".heat")).to_contain_text(re.compile("bold: the rank of .*␣Tokyo"))


def test_title_names_the_measure(opened: Page) -> None:
    title = opened.locator(".panel h2")
    expect(title).to_have_text("Change of the logit of ␣Tokyo")
    opened.get_by_label("Measure").select_option("kl")
    expect(title).to_have_text("KL divergence in nats")
    assert serious_findings(opened) == []


def test_a_link_shows_its_selection(opened: Page) -> None:
    opened.set_viewport_size({"width": 390, "height": 500})
    address = opened.url
    opened.goto("about:blank")
    opened.goto(f"{address}#sel=L0|position 7")
    opened.wait_for_selector("html[data-ready=complete]", state="attached")
    assert in_sight(opened, opened.locator(".heat .chip.selected"))


def test_facts_of_a_selection_stay_in_sight_in_a_narrow_window(opened: Page) -> None:
    opened.set_viewport_size({"width": 768, "height": 300})
    opened.locator('.heat [data-id="L3|position 0"]').click()
    facts = opened.locator(".inspector h2")
    expect(facts).to_have_text("L3, The (0)")
    expect(facts).to_be_in_viewport()
    opened.keyboard.press("Escape")
    expect(facts).not_to_be_in_viewport()

"""The page of a trace, in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Page, expect

import januslens


def test_the_overview_shows_what_each_residual_says(
    tab: Page, demo_page: Path, demo_trace: tuple[januslens.Trace, januslens.Trace]
) -> None:
    _, overview = demo_trace
    tab.goto(demo_page.as_uri())
    outputs = overview.nodes_of("BLOCK_OUTPUT")
    assert len(outputs) == 32
    for node in outputs:
        cell = tab.locator(f'.overview .cell[data-id="{node.id}"]')
        assert node.projection
        top = re.escape(str(node.projection.top[0].token))
        expect(cell).to_have_attribute("aria-label", re.compile(rf", top {top}, rank"))

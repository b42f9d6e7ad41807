"""axe-core finds no serious problem in the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.pages.conftest import Traced
from tests.pages.test_trace_page import opened

AXE = Path(__file__).parents[2] / "client/viewer/node_modules/axe-core/axe.min.js"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    "state",
    [
        "",
        "sel=L3/p7/MEMORY_VALUE/h2/s3&pin=L3/p7/HEAD_OUTPUT/h2&q=Tokyo",
        "view=table",
        "map=heads&heads=3.2",
    ],
)
def test_axe_reports_nothing_serious(tab: Page, demo: Traced, state: str, theme: str) -> None:
    if not AXE.is_file():
        pytest.fail("expected axe-core; run `make check-viewer`, which needs npm")
    opened(tab, demo, f"{state}&theme={theme}")
    tab.evaluate(AXE.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = tab.evaluate("axe.run().then(result => result.violations)")
    serious = {
        violation["id"]: [node["html"][:160] for node in violation["nodes"][:3]]
        for violation in found
        if violation["impact"] in ("serious", "critical")
    }
    assert serious == {}

"""Run axe-core on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

AXE = Path(__file__).parents[2] / "client/viewer/node_modules/axe-core/axe.min.js"


def serious_findings(page: Page) -> list[str]:
    """Return the rules of serious or critical impact that the page breaks, and where."""
    if not AXE.is_file():
        pytest.fail("expected axe-core; run `make check-viewer`, which needs npm")
    if not page.evaluate("'axe' in window"):
        # Bypass the page's Content-Security-Policy, as browser tools do.
        page.evaluate(AXE.read_text(encoding="utf-8"))
    # The findings alone: all results of a page are megabytes of which most say that a rule holds.
    found: list[dict[str, Any]] = page.evaluate(
        "() => axe.run({ resultTypes: ['violations'] }).then((results) => results.violations)"
    )
    return [
        f"{violation['id']}: {[node['target'] for node in violation['nodes'][:3]]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]

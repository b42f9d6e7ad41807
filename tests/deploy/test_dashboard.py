"""The Grafana dashboard is valid and readable."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from tests.deploy.dashboard import dashboard, panels

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

# Fields that Grafana writes and that its models do not have.
UNMODELLED = {"definition", "titleFormat", "textFormat"}


def lost(written: Any, read: Any, path: str = "") -> Iterator[str]:
    """Return the fields that are not the same after parsing and writing them again."""
    if isinstance(written, dict) and isinstance(read, dict):
        for name, value in written.items():
            if name not in UNMODELLED:
                yield from lost(value, read.get(name), f"{path}/{name}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for i, (one, other) in enumerate(zip(written, read, strict=True)):
            yield from lost(one, other, f"{path}[{i}]")
    elif written != read:
        yield path


def test_grafanas_models_accept_every_field() -> None:
    plugins.register_default_plugins()
    read = Dashboard.from_json(dashboard())
    assert list(lost(dashboard(), json.loads(JSONEncoder().encode(read)))) == []


def test_grafanas_models_reject_misspelt_fields() -> None:
    plugins.register_default_plugins()
    misspelt = dashboard()
    misspelt["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    read = Dashboard.from_json(misspelt)
    fields = list(lost(misspelt, json.loads(JSONEncoder().encode(read))))
    assert fields == ["/panels[1]/fieldConfig/defaults/units"]


def test_panels_have_units_legends_and_explanations() -> None:
    for panel in panels():
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] not in {"", "short"}
        assert all(target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_panel_names_are_unique() -> None:
    titles = [panel["title"] for panel in dashboard()["panels"]]
    assert len(set(titles)) == len(titles)
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(titles)


def test_the_runbook_names_existing_panels() -> None:
    text = OPERATIONS.read_text().partition("## Plan the size")[2]
    named = re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", text)
    titles = {panel["title"] for panel in panels()}
    assert {" ".join(name.split()) for name in named} <= titles
    assert len(named) > 5

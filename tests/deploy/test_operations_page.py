"""docs/operations.md lists every setting and every metric."""

from __future__ import annotations

import re
from pathlib import Path

import prometheus_client

from januslens_server import telemetry
from januslens_server.config import ENVIRONMENT_PREFIX, ServerSettings
from januslens_server.config.command import flag_of

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def rows(first_heading: str) -> list[list[str]]:
    """Return the cells of the table with this heading in the first column, without backquotes."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return table


def described(name: str) -> list[str]:
    default = ServerSettings.model_fields[name].default
    shown = "none" if default in (None, ()) else str(default)
    return [flag_of(name), f"{ENVIRONMENT_PREFIX}{name.upper()}", name, shown]


def test_every_setting_is_listed_with_its_names_and_default() -> None:
    described_rows = [described(name) for name in ServerSettings.model_fields]
    assert [row[:4] for row in rows("flag")] == described_rows


def test_every_metric_is_listed_with_its_labels() -> None:
    own = {
        metric._name: metric
        for metric in vars(telemetry).values()
        if isinstance(metric, prometheus_client.metrics.MetricWrapperBase)
    }
    listed = {
        re.sub("_total$", "", name): tuple(re.findall(r"\w+", labels))
        for name, labels, _ in rows("metric")
    }
    assert listed == {name: tuple(metric._labelnames) for name, metric in own.items()}

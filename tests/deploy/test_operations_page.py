"""What docs/operations.md lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import prometheus_client

from januslens_server import telemetry
from januslens_server.config import ENVIRONMENT_PREFIX, settings_command

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
ABOUT_SETTINGS = {"config", "make_token", "print_config"}


def rows(first_heading: str) -> list[list[str]]:
    """The cells of the table whose first column is headed so, without backquotes."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return table


def described(option: click.Parameter) -> list[str]:
    name = str(option.name)
    default: Any = "none" if option.multiple or option.default is None else option.default
    return [option.opts[0], f"{ENVIRONMENT_PREFIX}_{name.upper()}", name, str(default)]


def test_every_setting_is_listed_with_its_names_and_default() -> None:
    options = [o for o in settings_command().params if o.name not in ABOUT_SETTINGS]
    assert [row[:4] for row in rows("flag")] == [described(option) for option in options]


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

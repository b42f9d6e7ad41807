"""Read the Grafana dashboard from its ConfigMap."""

from __future__ import annotations

import json
from typing import Any

from tests.deploy.manifests import with_components


def dashboard() -> dict[str, Any]:
    """Return the whole dashboard."""
    (config,) = (
        resource
        for resource in with_components("monitoring").of_kind("ConfigMap")
        if "grafana_dashboard" in resource["metadata"]["labels"]
    )
    (text,) = config["data"].values()
    found: dict[str, Any] = json.loads(text)
    return found


def panels() -> list[dict[str, Any]]:
    """Return the panels without rows, which are headings."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def asked(expression: str) -> str:
    """Return an expression as Grafana sends it."""
    for variable, value in {
        "$namespace": "januslens",
        "$pod": ".*",
        "$__rate_interval": "10s",
    }.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression

"""Alerts fire in the right cases only, and each has a runbook entry."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.manifests import with_components

CASES = Path(__file__).with_name("rules_test.yaml")
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

COMPARISON = re.compile(r"(==|>|<) [\d.* ]+")
ALWAYS = {"==": ">= 0", ">": "> -1", "<": "< 1e9"}
NEVER = {"==": "== 7", ">": "> 1e9", "<": "< 0"}


def spec() -> dict[str, Any]:
    """The PrometheusRule's groups, in the format of Prometheus' own rule files."""
    found: dict[str, Any] = with_components("monitoring").one("PrometheusRule")["spec"]
    return found


def alerts() -> dict[str, dict[str, Any]]:
    rules = [rule for group in spec()["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    assert found is not None, "expected promtool (Debian's package prometheus), found none"
    command = [found, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def outcome(
    folder: Path, rules: dict[str, Any], alert: str = ""
) -> subprocess.CompletedProcess[str]:
    """Return the output of `promtool test rules` for all cases, or for those of one alert."""
    cases = yaml.safe_load(CASES.read_text())
    cases["tests"] = [case for case in cases["tests"] if alert in str(case["alert_rule_test"])]
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules, width=1000))
    (folder / CASES.name).write_text(yaml.safe_dump(cases, width=1000))
    return promtool("test", "rules", folder / CASES.name)


def test_the_rules_are_valid(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec(), width=1000))
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_documented_configuration_is_valid_with_the_rules(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(rule_files:.*?)```", OPERATIONS.read_text(), re.DOTALL)
    configuration = yaml.safe_load(block)
    (rules,), (scraped,) = configuration["rule_files"], configuration["scrape_configs"]
    # JSON, as one of the programs `yq` writes.
    (tmp_path / rules).write_text(json.dumps(spec()))
    (tmp_path / "prometheus.yml").write_text(block)
    checked = promtool("check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{rule_count()} rules found" in checked.stdout + checked.stderr
    # The labels that the rules of the operator's installation get from its PodMonitor.
    assert scraped["job_name"] == "januslens"
    assert scraped["static_configs"][0]["labels"].keys() == {"namespace", "pod"}


def rule_count() -> int:
    return sum(len(group["rules"]) for group in spec()["groups"])


def test_every_case_has_its_expected_alerts(tmp_path: Path) -> None:
    done = outcome(tmp_path, spec())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("thresholds", [ALWAYS, NEVER], ids=["always", "never"])
@pytest.mark.parametrize("name", alerts())
def test_the_cases_detect_alerts_that_fire_too_often_or_never(
    tmp_path: Path, name: str, thresholds: dict[str, str]
) -> None:
    rules = spec()
    (rule,) = (r for g in rules["groups"] for r in g["rules"] if r.get("alert") == name)
    expression = COMPARISON.sub(lambda found: f"{thresholds[found[1]]} ", rule["expr"])
    assert expression != rule["expr"]
    rule["expr"] = expression.partition("or absent")[0] if thresholds is NEVER else expression
    done = outcome(tmp_path, rules, name)
    assert done.returncode == 1
    assert name in done.stdout + done.stderr


@pytest.mark.parametrize("name", alerts())
def test_every_alert_has_a_severity_and_a_runbook(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"].endswith(".")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/operations.md"
    assert anchor == name.lower()


def test_the_runbook_has_an_entry_for_every_alert_and_no_other() -> None:
    headings = re.findall(r"^### (Januslens\w+)$", OPERATIONS.read_text(), re.MULTILINE)
    assert headings == list(alerts())

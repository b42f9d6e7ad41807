"""A real Prometheus scrapes a real server under load: all queries return data."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from tests.deploy.dashboard import asked, panels
from tests.deploy.manifests import INSTALLATIONS
from tests.deploy.test_rules import spec
from tests.support.calls import methods, prompt, started
from tests.support.prometheus import Prometheus, running_prometheus
from tests.support.server import ServerProcess, running_server

from januslens.v1 import common_pb2, gradient_lens_pb2, lens_pb2, models_pb2, trace_pb2

SCRAPES = 5
OURS = re.compile(r"\b(?:grpc_server|januslens)_\w+")
# These never occur on a healthy server, so an empty result is correct.
QUIET = {"Requests by status, without OK"}


@dataclass(frozen=True)
class Observed:
    """Prometheus after the load, and the last metrics page that it scraped."""

    prometheus: Prometheus
    page: str


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """A separate server, so that all figures are from this load only."""
    folder = tmp_path_factory.mktemp("prometheus")
    with running_server() as server:
        address = server.metrics_url.removeprefix("http://").removesuffix("/metrics")
        with running_prometheus(folder, {"januslens-0": address}, spec()) as prometheus:
            _load(server, prometheus)
            with urlopen(server.metrics_url, timeout=10) as answer:  # noqa: S310 - http
                yield Observed(prometheus, answer.read().decode())


def _load(server: ServerProcess, prometheus: Prometheus) -> None:
    """Send every kind of call, four at a time, for the duration of some scrapes."""
    _wait_for_scrapes(prometheus, 1)  # Prometheus needs five seconds to discover its targets
    over = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(_call_until, over, server.address) for _ in range(4)]
        try:
            _wait_for_scrapes(prometheus, SCRAPES)
        finally:
            over.set()
        for caller in callers:
            caller.result()


def _wait_for_scrapes(prometheus: Prometheus, count: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        counted = prometheus.query("count_over_time(up[1m])")
        if counted and float(counted[0]["value"][1]) >= count:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected {count} scrapes, got {counted}; {prometheus.targets()}")
        time.sleep(0.2)


def _call_until(over: threading.Event, address: str) -> None:
    said = prompt("The capital of Japan is")
    told = gradient_lens_pb2.NegativeLogLikelihood(target=common_pb2.Target(text=" Tokyo"))
    requests = {
        "Trace": trace_pb2.TraceRequest(input=said, layers=[0, 1]),
        "GradientLens": gradient_lens_pb2.GradientLensRequest(input=said, nll=told),
        "Tokenize": models_pb2.TokenizeRequest(text="Japan"),
        "ListModels": models_pb2.ListModelsRequest(),
        "Project": lens_pb2.ProjectRequest(),
    }
    with grpc.insecure_channel(address) as channel:
        while not over.is_set():
            for method, request in requests.items():
                call = started(channel, method, request, timeout=60)
                try:
                    list(call) if methods()[method].server_streaming else call.result()
                except grpc.RpcError:
                    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT


def names(expression: str) -> set[str]:
    """Return the metrics in an expression; names of recorded ones contain colons."""
    return set(OURS.findall(re.sub(r"\w+:[\w:]+", "", expression)))


def test_the_server_is_scraped(observed: Observed) -> None:
    (target,) = observed.prometheus.targets()
    assert (target["health"], target["lastError"]) == ("up", "")


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_panel_has_data(observed: Observed, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        samples = observed.prometheus.query(asked(target["expr"]))
        assert samples or panel["title"] in QUIET
        for sample in samples:
            assert float(sample["value"][1]) >= 0  # NaN is no figure
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown <= sample["metric"].keys()


def test_the_dashboard_agrees_with_the_server(observed: Observed) -> None:
    (ready,) = observed.prometheus.query('januslens_ready{namespace="januslens"}')
    assert ready["value"][1] == "1"
    busy = 'sum(rate(januslens_busy_seconds_total{job="januslens"}[10s]))'
    (utilisation,) = observed.prometheus.query(busy)
    assert 0.3 < float(utilisation["value"][1]) <= 1.05


def test_rules_are_evaluated_without_error_and_none_fires(observed: Observed) -> None:
    rules = observed.prometheus.rules()
    assert {rule["health"] for rule in rules} == {"ok"}
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert firing == []


def test_every_metric_of_the_rules_is_on_the_page(observed: Observed) -> None:
    used = set()
    for group in spec()["groups"]:
        for rule in group["rules"]:
            used |= names(rule["expr"])
    assert used
    assert [
        name
        for name in used
        if f"\n{name}{{" not in observed.page + "\n"
        and f"\n{name} " not in observed.page
        and f"# TYPE {name} gauge\n" not in observed.page  # of files that this server has not
    ] == []


def test_the_autoscalers_queries_return_data(observed: Observed) -> None:
    for trigger in INSTALLATIONS["production"]().one("ScaledObject")["spec"]["triggers"]:
        (sample,) = observed.prometheus.query(trigger["metadata"]["query"])
        assert float(sample["value"][1]) >= 0


def test_promtool_accepts_the_metric_names(observed: Observed) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],  # noqa: S607 - as an operator calls it
        input=observed.page,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout + checked.stderr == ""

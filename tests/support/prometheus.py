"""A real Prometheus that scrapes servers of a test as it scrapes pods in a deployment."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from tests.support.tethered import tethered

START_SECONDS = 30
STOP_SECONDS = 10


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, with its address."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the current samples of an expression; fails if it is invalid."""
        answer = self._get("/api/v1/query", query=expression)
        samples: list[dict[str, Any]] = answer["data"]["result"]
        return samples

    def targets(self) -> list[dict[str, Any]]:
        """Return the scraped targets, each with its last error."""
        found: list[dict[str, Any]] = self._get("/api/v1/targets")["data"]["activeTargets"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule with its health and last error."""
        groups = self._get("/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _get(self, path: str, **parameters: str) -> dict[str, Any]:
        with urlopen(f"{self.url}{path}?{urlencode(parameters)}", timeout=10) as answer:  # noqa: S310 - http
            found: dict[str, Any] = json.load(answer)
        return found


@contextmanager
def running_prometheus(
    folder: Path, scraped: Mapping[str, str], rules: Mapping[str, Any]
) -> Iterator[Prometheus]:
    """Scrape `scraped` (addresses by pod) each second, with the labels of the operator."""
    program = shutil.which("prometheus")
    assert program is not None, "expected Debian's package prometheus, found none"
    (folder / "rules.yaml").write_text(yaml.safe_dump(dict(rules), width=1000))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(_configuration(scraped)))
    address = f"127.0.0.1:{_free_port()}"
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            tethered(
                [
                    program,
                    f"--config.file={folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ]
            ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_until_ready(process, f"http://{address}", folder / "log")
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def _configuration(scraped: Mapping[str, str]) -> dict[str, Any]:
    targets = [
        {"targets": [address], "labels": {"namespace": "januslens", "pod": pod}}
        for pod, address in scraped.items()
    ]
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "januslens", "static_configs": targets}],
    }


def _free_port() -> int:
    """Return a free port, because Prometheus cannot choose one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urlopen(f"{url}/-/ready", timeout=1):  # noqa: S310 - http
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"expected Prometheus to be ready:\n{log.read_text()}") from None
            time.sleep(0.05)

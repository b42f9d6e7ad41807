"""All hostile folders and attacks at once, under a memory limit, beside a model that serves."""

from __future__ import annotations

from pathlib import Path

import grpc

from januslens.v1 import models_pb2, service_pb2_grpc
from januslens_server.demo import model_path
from tests.architectures.cases import Case
from tests.hostile.test_folders import BOMBS, LENGTHS, SIZES, describe
from tests.loading.folders import saved
from tests.soak.test_hostile_peers import (
    ATTACKS,
    LIMITS,
    Target,
    health_checked,
    served,
)
from tests.support.calls import started, timeless
from tests.support.model_folders import healthy
from tests.support.server import running_server

# Data of the process: its heap, all private mappings and stacks.
LIMIT = 3 * 2**30


def hostile_folders(root: Path) -> dict[str, Path]:
    """Return every hostile folder by the name of its model."""
    folders: dict[str, Path] = {}
    for i, bomb in enumerate(BOMBS.values()):
        folder = folders[f"bomb-{i}"] = healthy(root / str(i) / "model")
        bomb(folder)
    for i, (family, changes) in enumerate(LENGTHS.values()):
        folder = folders[f"length-{i}"] = root / f"length-{i}"
        saved(Case(family, "plain", SIZES[family]), folder)
        describe(folder, **changes)
    # A folder without a regular config.json is refused before the server starts.
    return {name: f for name, f in folders.items() if (f / "config.json").is_file()}


def test_one_model_serves_beside_every_hostile_one_under_a_memory_limit(tmp_path: Path) -> None:
    hostile = hostile_folders(tmp_path)
    sources = {**hostile, "healthy": model_path()}
    flags = [part for item in sources.items() for part in ("--model", "=".join(map(str, item)))]
    limits = ("prlimit", f"--data={LIMIT}")
    with (
        running_server(*flags, *LIMITS, "--health-port", "0", within=limits, seconds=300) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        models = stub.ListModels(models_pb2.ListModelsRequest()).models
        states = {model.name: model.state for model in models}
        ready, failed = models_pb2.Model.STATE_READY, models_pb2.Model.STATE_FAILED
        assert states == {**dict.fromkeys(hostile, failed), "healthy": ready}
        target = Target("limited", server, None, None, None, model="healthy")
        request = target.trace(4)
        before = [timeless(message) for message in started(channel, "Trace", request)]
        with health_checked(server.health_address) as taken:
            for attack in ATTACKS.values():
                attack(target)
                served(target)
        assert max(taken) < 5
        assert [timeless(message) for message in started(channel, "Trace", request)] == before
    failures = [line for line in server.lines if " FAILED" in line]
    assert len(failures) == len(hostile)
    assert "Traceback" not in server.log

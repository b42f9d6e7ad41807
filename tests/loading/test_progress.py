"""Progress of loading, and loading that makes none."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from pathlib import Path

import pytest

from januslens_server.errors import (
    InvalidRequest,
    ModelExists,
    ModelLoading,
    ModelNotFound,
    ServerDraining,
)
from januslens_server.models.loader import ModelSource, load, weights_hash
from januslens_server.models.progress import LoadingProgress
from januslens_server.models.registry import Registry
from januslens_server.pipelines.self_check import checked
from januslens_server.results import ModelState
from januslens_server.rpc.health import LIVE, NOT_SERVING, SERVING, Health
from tests.architectures.cases import CASES
from tests.loading.folders import saved


class Recorded(LoadingProgress):
    """Records each fraction."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        super().__init__()

    def alive(self) -> None:
        super().alive()
        self.seen.append(self.fraction)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    case = next(case for case in CASES if case.id == "gpt2-plain")
    return saved(case, tmp_path_factory.mktemp("tiny") / "model")


def test_the_fraction_grows_through_reading_checking_and_hashing(source: ModelSource) -> None:
    progress = Recorded()
    model = load(source, progress)
    assert progress.seen == sorted(progress.seen)
    assert progress.seen[-1] == progress.fraction == 1.0
    parts = [round(3 * fraction, 6) for fraction in progress.seen]
    for first in range(3):
        within = [part for part in parts if first < part < first + 1]
        names = len(list(model.network.named_parameters()))
        assert len(within) >= (names // 2 if first < 2 else 0)  # a small file is hashed at once


def test_hashing_reports_the_share_of_all_files(tmp_path: Path) -> None:
    for name, size in (("a", 3 * 2**20), ("b", 2**20)):
        (tmp_path / name).write_bytes(bytes(size))
    shares: list[float] = []
    weights_hash(tmp_path, ["a", "b"], shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_a_registry_unloads_a_model_and_frees_its_memory(source: ModelSource) -> None:
    forgotten: list[str] = []
    registry = Registry([], checked, lambda _status: None, forgotten.append)
    assert registry.add(source)
    with pytest.raises(ModelLoading):
        registry.unload(source.name)
    registry.load(source.name)
    assert not registry.add(source)
    with pytest.raises(ModelExists):
        registry.add(ModelSource(source.name, "/elsewhere"))
    network = weakref.ref(registry.get(source.name).network)
    gc.freeze()  # as the server does when its models are loaded
    registry.unload(source.name)
    assert network() is None
    assert forgotten == [source.name]
    assert registry.statuses() == []
    with pytest.raises(ModelNotFound):
        registry.unload(source.name)
    gc.unfreeze()


def test_a_model_that_is_still_referenced_is_collected_few_times(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("januslens_server.models.registry.RELEASE_SECONDS", 1.0)
    registry = Registry([], checked, lambda _status: None)
    registry.add(source)
    registry.load(source.name)
    kept = registry.get(source.name).network
    full = [0]

    def count(phase: str, info: dict[str, int]) -> None:
        full[0] += phase == "start" and info["generation"] == 2

    gc.callbacks.append(count)
    try:
        registry.unload(source.name)
    finally:
        gc.callbacks.remove(count)
    assert kept is not None
    assert f"model {source.name} is unloaded, but its memory is still in use" in caplog.text
    assert 1 <= full[0] <= 6  # at 0, 0.1, 0.3, 0.7 and 1.5 s; fewer if a collection takes long
    gc.unfreeze()


def test_thousands_of_loads_and_unloads_leave_nothing(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("januslens_server.models.registry.MAX_MODELS", 500)
    registry = Registry([], checked, lambda _status: None)
    for part in range(4):
        names = [f"{part}-{i}" for i in range(500)]
        for name in names:
            assert registry.add(ModelSource(name, "/none"))
        with pytest.raises(InvalidRequest, match="expected at most 500; unload some"):
            registry.add(ModelSource("more", "/none"))
        for name in names:
            registry.load(name)
            assert registry.status(name).state is ModelState.FAILED
            registry.unload(name)
    for _ in range(3):
        assert registry.add(source)
        registry.load(source.name)
        with registry.using(source.name):
            pass
        registry.unload(source.name)
    left = [vars(registry)[name] for name in ("_statuses", "_sources", "_progress", "_users")]
    assert left == [{}, {}, {}, {}]
    gc.unfreeze()


def test_no_model_is_loaded_or_unloaded_while_the_server_shuts_down(source: ModelSource) -> None:
    registry = Registry([source], checked, lambda _status: None)
    registry.close()
    registry.load(source.name)
    assert registry.status(source.name).state is ModelState.LOADING
    with pytest.raises(ServerDraining):
        registry.add(ModelSource("other", "/none"))
    with pytest.raises(ServerDraining):
        registry.check_unloadable(source.name)


def test_seconds_without_progress_count_while_a_model_loads(source: ModelSource) -> None:
    later = time.monotonic() + 100
    registry = Registry([source], checked, lambda _status: None)
    assert 99 < registry.seconds_without_progress(later) <= 100
    registry.load(source.name)
    assert registry.statuses()[0].state is ModelState.READY
    assert registry.seconds_without_progress(later) == 0


async def test_stalled_loading_ends_the_live_service() -> None:
    health = Health()
    assert health._statuses[LIVE] == SERVING
    for stalled, status in itertools.product((True, False), (SERVING,)):
        health.set_stalled(stalled)
        health.update([])
        assert health._statuses[LIVE] == (NOT_SERVING if stalled else status)

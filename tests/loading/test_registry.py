"""Several models: each has its own state, and they load while others are served."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from januslens_server.errors import ModelFailed, ModelLoading
from januslens_server.models.loader import ModelSource
from januslens_server.models.registry import Registry
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.self_check import checked
from januslens_server.pipelines.trace import trace
from januslens_server.results import Guarantee, ModelState, ModelStatus, TraceSummary
from januslens_server.specs import TraceSpec
from tests.architectures.cases import CASES
from tests.loading.folders import saved

BY_ID = {case.id: case for case in CASES}
SPEC = TraceSpec(prompt=(1, 2, 3))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ModelSource]:
    folder = tmp_path_factory.mktemp("models")
    return [
        saved(BY_ID[name], folder / name) for name in ("gpt2-plain", "llama-grouped", "opt-plain")
    ]


def states(registry: Registry) -> dict[str, ModelState]:
    return {status.name: status.state for status in registry.statuses()}


def unobserved(_status: ModelStatus) -> None:
    """Ignore changes of state."""


def test_one_serves_while_the_next_loads(sources: list[ModelSource]) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slow_check(model: ResidentModel) -> tuple[ResidentModel, Sequence[Guarantee]]:
        if model.name == "llama":
            reached.set()
            assert go_on.wait(30)
        return checked(model)

    registry = Registry(sources[:2], slow_check, unobserved)
    with pytest.raises(ModelLoading):
        registry.get("gpt2")
    loading = threading.Thread(target=registry.load_all)
    loading.start()
    assert reached.wait(30)
    *_, summary = trace(resolve_trace(registry.get("gpt2"), SPEC), lambda: None)
    assert isinstance(summary, TraceSummary)
    with pytest.raises(ModelLoading):
        registry.get("llama")
    assert states(registry) == {"gpt2": ModelState.READY, "llama": ModelState.LOADING}
    go_on.set()
    loading.join(30)
    assert states(registry) == {"gpt2": ModelState.READY, "llama": ModelState.READY}
    assert registry.get("llama").provenance.architecture == "LlamaForCausalLM"


def test_each_has_its_own_state_and_numbers(sources: list[ModelSource]) -> None:
    broken = ModelSource("broken", str(Path(sources[0].location) / "absent"))
    tight = replace(sources[2], name="tight", limits={"cpu": 1})
    registry = Registry([sources[0], broken, tight, *sources[1:]], checked, unobserved)
    registry.load_all()
    failed = {name for name, state in states(registry).items() if state is ModelState.FAILED}
    assert failed == {"broken", "tight"}
    with pytest.raises(ModelFailed, match=r"'tight' cannot be served: .*only 1 B on cpu is "):
        registry.get("tight")
    served = [registry.get(name) for name in ("gpt2", "llama", "opt")]
    assert len({model.provenance.revision for model in served}) == 3


def test_memory_of_a_failed_model_is_released(sources: list[ModelSource]) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []

    def failing(model: ResidentModel) -> tuple[ResidentModel, Sequence[Guarantee]]:
        gc.collect()
        alive.append(sum(network() is not None for network in loaded))
        loaded.append(weakref.ref(model.network))
        raise ModelFailed("expected to pass, did not")

    registry = Registry(sources, failing, unobserved)
    registry.load_all()
    assert alive == [0, 0, 0]
    assert set(states(registry).values()) == {ModelState.FAILED}

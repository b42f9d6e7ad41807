"""States of configured models and which model is served; tests/loading covers folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from januslens_server.demo import model_path
from januslens_server.errors import (
    InvalidRequest,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    RevisionNotFound,
    ServerDraining,
)
from januslens_server.models.loader import ModelSource
from januslens_server.models.registry import Registry, release
from januslens_server.models.resident import ResidentModel
from januslens_server.results import Guarantee, ModelState, ModelStatus

DEMO = ModelSource("demo", str(model_path()))
OTHER = ModelSource("other", str(model_path()))
ABSENT = ModelSource("absent", "/nowhere/at/all")
HELD, BROKEN = Guarantee("held", 0.0, 1.0), Guarantee("broken", 2.0, 1.0)


def registry(
    *sources: ModelSource,
    guarantees: Sequence[Guarantee] = (HELD,),
    observe: Callable[[ModelStatus], None] = lambda _: None,
) -> Registry:
    return Registry(sources, lambda model: (model, guarantees), observe)


def states(registry: Registry) -> dict[str, ModelState]:
    return {status.name: status.state for status in registry.statuses()}


def test_models_are_loading_at_first() -> None:
    waiting = registry(DEMO, ABSENT)
    assert set(states(waiting).values()) == {ModelState.LOADING}
    with pytest.raises(ModelLoading, match="model 'demo' is still loading"):
        waiting.get("demo")


def test_failed_model_does_not_affect_the_others() -> None:
    seen: list[tuple[str, ModelState]] = []
    loaded = registry(ABSENT, DEMO, observe=lambda s: seen.append((s.name, s.state)))
    loaded.load_all()
    assert seen == [("absent", ModelState.FAILED), ("demo", ModelState.READY)]
    assert states(loaded) == dict(seen)
    assert loaded.get("demo").name == "demo"
    with pytest.raises(ModelFailed, match="model 'absent' cannot be served: /nowhere"):
        loaded.get("absent")


def test_exception_in_the_self_check_fails_only_that_model() -> None:
    def check(model: ResidentModel) -> tuple[ResidentModel, list[Guarantee]]:
        if model.name == "demo":
            raise ZeroDivisionError("in the check")
        return model, [HELD]

    loaded = Registry([DEMO, OTHER], check, lambda _: None)
    loaded.load_all()
    assert states(loaded) == {"demo": ModelState.FAILED, "other": ModelState.READY}
    with pytest.raises(ModelFailed, match="self-check failed: in the check"):
        loaded.get("demo")


@pytest.mark.parametrize("error", [2.0, float("nan"), float("inf")])
def test_broken_guarantee_fails_the_model(error: float) -> None:
    loaded = registry(DEMO, guarantees=[HELD, Guarantee("broken", error, 1.0)])
    loaded.load_all()
    with pytest.raises(
        ModelFailed, match=r"self-check broken failed: error .*, expected at most 1"
    ):
        loaded.get("demo")
    (status,) = loaded.statuses()
    assert [guarantee.held for guarantee in status.guarantees] == [True, False]


def test_get_checks_name_and_revision() -> None:
    loaded = registry(DEMO)
    loaded.load_all()
    model = loaded.get("demo")
    assert loaded.get("") is model
    assert loaded.get("demo", model.provenance.revision) is model
    with pytest.raises(ModelNotFound, match="unknown model 'Demo': expected one of demo"):
        loaded.get("Demo")
    with pytest.raises(RevisionNotFound, match="unknown revision 'main' of model 'demo'"):
        loaded.get("demo", "main")


def test_empty_name_means_the_only_model_that_serves() -> None:
    loaded = registry(DEMO, ABSENT)
    loaded.load("absent")
    with pytest.raises(ModelLoading, match="model 'demo' is still loading"):
        loaded.get("")
    loaded.load("demo")
    assert loaded.get("").name == loaded.status("").name == "demo"


def test_empty_name_is_refused_while_another_model_loads_or_serves() -> None:
    loaded = registry(DEMO)
    loaded.load_all()
    loaded.add(OTHER)
    for _ in ("loading", "READY"):
        with pytest.raises(InvalidRequest, match="no model given: expected one of demo, other"):
            loaded.get("")
        loaded.load("other")
    assert loaded.get("", scope=lambda name: name == "other").name == "other"


def test_empty_name_of_models_that_all_failed_names_them() -> None:
    loaded = registry(ABSENT)
    loaded.load_all()
    with pytest.raises(ModelFailed, match="model 'absent' cannot be served"):
        loaded.get("")
    loaded.add(ModelSource("gone", "/nowhere"))
    loaded.load("gone")
    with pytest.raises(InvalidRequest, match="no model given: expected one of absent, gone"):
        loaded.get("")


def test_a_prepared_model_serves_and_is_loading_until_it_is_settled() -> None:
    loaded = registry()
    loaded.expect(DEMO)
    assert loaded.prepare("demo") == ""
    assert states(loaded) == {"demo": ModelState.LOADING}
    loaded.show_progress_of_all("demo", 0.5)
    assert loaded.status("demo").loaded_fraction == 0.5
    assert loaded.get("demo").name == "demo"
    loaded.settle("demo")
    assert states(loaded) == {"demo": ModelState.READY}
    assert loaded.status("demo").loaded_fraction == 1.0


def test_failure_elsewhere_fails_a_prepared_model_and_frees_it() -> None:
    loaded = registry()
    loaded.expect(DEMO)
    loaded.prepare("demo")
    unused = loaded.settle("demo", "process 2 could not load it")
    assert unused is not None
    release("demo", unused)
    assert unused() is None
    with pytest.raises(ModelFailed, match="process 2 could not load it"):
        loaded.get("demo")


def test_closed_registry_raises_server_draining() -> None:
    loaded = registry(DEMO)
    loaded.load_all()
    loaded.close()
    for name in ("demo", "", "nobody"):
        with pytest.raises(ServerDraining):
            loaded.get(name)
    assert states(loaded) == {"demo": ModelState.READY}

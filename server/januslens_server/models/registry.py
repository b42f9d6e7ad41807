"""The configured models and the state of each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from januslens_server.demo import model_path
from januslens_server.errors import (
    InvalidRequest,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    PermissionDenied,
    ServerDraining,
)
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.resident import ResidentModel
from januslens_server.results import Guarantee, ModelState, ModelStatus

logger = logging.getLogger(__name__)

SelfCheck = Callable[[ResidentModel], Sequence[Guarantee]]
Observer = Callable[[ModelStatus], None]
Scope = Callable[[str], bool]


def embedded_source(device: str = "cpu", data_type: str = "auto") -> ModelSource:
    """The model `demo` that is shipped inside the package."""
    return ModelSource("demo", str(model_path()), device=device, data_type=data_type)


def _everything(_name: str) -> bool:
    return True


class Registry:
    """Loads models one after the other and hands out those that passed their self-check.

    Safe to read from any thread while `load_all` runs in one of its own.
    """

    def __init__(self, sources: Sequence[ModelSource], check: SelfCheck, observe: Observer) -> None:
        """`check` measures a loaded model; `observe` is told of every change of state."""
        self._sources = list(sources)
        self._check = check
        self._observe = observe
        self._lock = threading.Lock()
        self._statuses = {s.name: ModelStatus(s.name, ModelState.LOADING) for s in sources}
        self._resident: dict[str, ResidentModel] = {}
        self._closed = False

    def close(self) -> None:
        """From now on hand out no model: the server is shutting down."""
        self._closed = True

    def load_all(self) -> None:
        """Load and check every model; one that fails does not keep the others from serving."""
        for source in self._sources:
            self._load(source)

    def _load(self, source: ModelSource) -> None:
        """One model, of which nothing stays in memory if it fails."""
        try:
            model = load(source)
            guarantees = self._check(model)
        except ModelFailed as error:
            self._set(ModelStatus(source.name, ModelState.FAILED, str(error)))
            return
        except Exception as error:  # a broken folder can break transformers anywhere
            logger.exception("model %s broke while it was loaded", source.name)
            reason = f"{source.location}: {type(error).__name__}: {error}"
            self._set(ModelStatus(source.name, ModelState.FAILED, reason))
            return
        self._admit(model, guarantees)

    def _admit(self, model: ResidentModel, guarantees: Sequence[Guarantee]) -> None:
        broken = [g for g in guarantees if not g.held]
        reason = "; ".join(
            f"self-check {g.name}: expected an error of at most {g.tolerance:g}, "
            f"measured {g.measured_error:.3g}"
            for g in broken
        )
        if not broken:
            with self._lock:
                self._resident[model.name] = model
        state = ModelState.FAILED if broken else ModelState.READY
        facts, provenance = model.view.facts, model.provenance
        self._set(ModelStatus(model.name, state, reason, provenance, facts, guarantees))

    def _set(self, status: ModelStatus) -> None:
        with self._lock:
            self._statuses[status.name] = status
        self._observe(status)

    def bytes_cached_later(self) -> int:
        """How far the row caches of the resident models may still grow."""
        with self._lock:
            return sum(model.row_cache_growth for model in self._resident.values())

    def statuses(self) -> list[ModelStatus]:
        """Every configured model, in the order of configuration."""
        with self._lock:
            return list(self._statuses.values())

    def get(self, name: str, revision: str = "", scope: Scope = _everything) -> ResidentModel:
        """The model to serve; an empty name means the only configured one.

        `scope` says of a name whether the caller may use it: the others do not exist for it.

        Raises `InvalidRequest` for an empty name among several, `PermissionDenied` for a name
        beyond the scope, whether or not it exists, `ModelNotFound` for an unknown name or another
        revision, `ModelLoading` and `ModelFailed` by the model's state, `ServerDraining` once
        closed.
        """
        if self._closed:
            raise ServerDraining("the server is shutting down; ask another replica")
        with self._lock:
            statuses, resident = dict(self._statuses), dict(self._resident)
        offered = [known for known in statuses if scope(known)]
        name = name or _only(offered)
        if not scope(name):
            raise PermissionDenied(f"expected one of {_listed(offered)} for you, got {name!r}")
        if name not in statuses:
            raise ModelNotFound(f"expected one of {_listed(offered)}, got {name!r}")
        status = statuses[name]
        if status.state is ModelState.LOADING:
            raise ModelLoading(f"{name} is still loading")
        if status.state is ModelState.FAILED:
            raise ModelFailed(f"{name} cannot be served: {status.reason}")
        model = resident[name]
        if revision and revision != model.provenance.revision:
            raise ModelNotFound(
                f"expected revision {model.provenance.revision} of {name}, got {revision!r}"
            )
        return model


def _only(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise PermissionDenied("expected a model that you may use, and none of them is")
    raise InvalidRequest("model", f"expected one of {_listed(names)}, got none")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no model"

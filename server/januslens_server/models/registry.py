"""The configured models and the state of each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from januslens_server.demo import model_path
from januslens_server.errors import (
    InvalidRequest,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    PermissionDenied,
    RevisionNotFound,
    ServerDraining,
)
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.lora import load_lora
from januslens_server.models.resident import ResidentModel
from januslens_server.models.vetting import one_line
from januslens_server.results import Guarantee, ModelState, ModelStatus

logger = logging.getLogger(__name__)

# Returns the model, possibly with fewer known parts, and the results of its checks.
SelfCheck = Callable[[ResidentModel], tuple[ResidentModel, Sequence[Guarantee]]]
Observer = Callable[[ModelStatus], None]
Scope = Callable[[str], bool]


def embedded_source(device: str = "cpu", data_type: str = "auto") -> ModelSource:
    """The model `demo` that is shipped inside the package."""
    return ModelSource("demo", str(model_path()), device=device, data_type=data_type)


def _everything(_name: str) -> bool:
    return True


class Registry:
    """Load models one after the other and serve those that pass their self-check.

    All methods may be called from any thread while `load_all` runs in its own.
    """

    def __init__(self, sources: Sequence[ModelSource], check: SelfCheck, observe: Observer) -> None:
        """Prepare to load. `check` measures a model; `observe` receives each change of state."""
        self._sources = list(sources)
        self._check = check
        self._observe = observe
        self._lock = threading.Lock()
        self._statuses = {s.name: ModelStatus(s.name, ModelState.LOADING) for s in sources}
        self._resident: dict[str, ResidentModel] = {}
        self._closed = False

    def close(self) -> None:
        """Serve no model from now on, because the server is shutting down."""
        self._closed = True

    def load_all(self) -> None:
        """Load and check every model. A failed model affects only the LoRAs that change it."""
        for source in sorted(self._sources, key=lambda source: source.lora is not None):
            self._load(source)

    def _load(self, source: ModelSource) -> None:
        """Load one model. If it fails, nothing of it stays in memory."""
        try:
            model = load(source) if source.lora is None else self._with_lora(source, source.lora)
            model, guarantees = self._check(model)
        except ModelFailed as error:
            self._set(ModelStatus(source.name, ModelState.FAILED, str(error)))
            return
        except Exception as error:  # a hostile folder can break transformers anywhere
            logger.debug("model %s broke in its self-check", source.name, exc_info=True)
            reason = f"{source.location}: self-check failed: {one_line(error)}"
            self._set(ModelStatus(source.name, ModelState.FAILED, reason))
            return
        self._admit(model, guarantees)

    def _with_lora(self, source: ModelSource, folder: Path) -> ResidentModel:
        """Load a LoRA over a resident model."""
        base = self._resident.get(source.location)
        if base is None:
            raise ModelFailed(f"{folder}: its base, the model {source.location!r}, is not served")
        return load_lora(source.name, folder, base)

    def _admit(self, model: ResidentModel, guarantees: Sequence[Guarantee]) -> None:
        broken = [g for g in guarantees if not g.held]
        reason = "; ".join(guarantee.failure for guarantee in broken)
        if not broken:
            with self._lock:
                self._resident[model.name] = model
        state = ModelState.FAILED if broken else ModelState.READY
        facts, provenance = model.view.facts, model.provenance
        status = ModelStatus(model.name, state, reason, provenance, facts, guarantees)
        self._set(replace(status, levels=model.view.levels))

    def _set(self, status: ModelStatus) -> None:
        with self._lock:
            self._statuses[status.name] = status
        self._observe(status)

    def bytes_cached_later(self) -> int:
        """Bytes by which the row caches of all models may still grow."""
        with self._lock:
            return sum(model.row_cache_growth for model in self._resident.values())

    def statuses(self) -> list[ModelStatus]:
        """Status of every configured model, in the order of configuration."""
        with self._lock:
            return list(self._statuses.values())

    def status(self, name: str, scope: Scope = _everything) -> ModelStatus:
        """Return the status of one model; the name may be empty for the only permitted one.

        Raises `InvalidRequest`, `PermissionDenied` and `ModelNotFound` as `get` does.
        """
        with self._lock:
            statuses = dict(self._statuses)
        offered = [known for known in statuses if scope(known)]
        name = name or _only(offered)
        if not scope(name):
            raise PermissionDenied(
                f"model {name!r} is not permitted: expected one of {_listed(offered)}"
            )
        if name not in statuses:
            raise ModelNotFound(f"unknown model {name!r}: expected one of {_listed(offered)}")
        return statuses[name]

    def get(self, name: str, revision: str = "", scope: Scope = _everything) -> ResidentModel:
        """Return the model to serve.

        Args:
            name: The model's name; empty for the only one that the caller may use.
            revision: The expected revision; empty for any.
            scope: Whether the caller may use a name.

        Raises:
            InvalidRequest: The name is empty and several models are permitted.
            PermissionDenied: The name is not permitted, whether or not it exists.
            ModelNotFound: The name is unknown.
            RevisionNotFound: The model has another revision.
            ModelLoading: The model is still loading.
            ModelFailed: The model could not be loaded or failed its self-check.
            ServerDraining: The registry is closed.
        """
        if self._closed:
            raise ServerDraining("the server is shutting down; ask another replica")
        status = self.status(name, scope)
        name = status.name
        if status.state is ModelState.LOADING:
            raise ModelLoading(f"model {name!r} is still loading")
        if status.state is ModelState.FAILED:
            raise ModelFailed(f"model {name!r} cannot be served: {status.reason}")
        with self._lock:
            model = self._resident[name]
        if revision and revision != model.provenance.revision:
            raise RevisionNotFound(
                f"unknown revision {revision!r} of model {name!r}: expected "
                f"{model.provenance.revision!r}"
            )
        return model


def _only(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise PermissionDenied("no model is permitted for this caller")
    raise InvalidRequest("model", f"no model given: expected one of {_listed(names)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no model"

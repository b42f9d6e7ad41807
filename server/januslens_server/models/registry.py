"""The server's models and the state of each."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from januslens_server import tuning
from januslens_server.demo import model_path
from januslens_server.errors import (
    InvalidRequest,
    ModelExists,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    PermissionDenied,
    RevisionNotFound,
    ServerDraining,
)
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.lora import load_lora
from januslens_server.models.progress import LoadingProgress
from januslens_server.models.resident import ResidentModel
from januslens_server.models.vetting import one_line
from januslens_server.results import Guarantee, ModelState, ModelStatus

logger = logging.getLogger(__name__)

# Returns the model, possibly with fewer known parts, and the results of its checks.
SelfCheck = Callable[[ResidentModel], tuple[ResidentModel, Sequence[Guarantee]]]
Observer = Callable[[ModelStatus], None]
Scope = Callable[[str], bool]

# Seconds within which the tensors of an unloaded model must be free, and between the first two
# collections.
# The last references to them are those of requests that have just ended.
RELEASE_SECONDS, COLLECTION_SECONDS = 10.0, 0.1
# Models in any state, of which ListModels returns up to 1.6 KB each.
MAX_MODELS = 1000


def embedded_source(device: str = "cpu", data_type: str = "auto") -> ModelSource:
    """The model `demo` that is shipped inside the package."""
    return ModelSource("demo", str(model_path()), device=device, data_type=data_type)


def _everything(_name: str) -> bool:
    return True


def _forget_nothing(_name: str) -> None:
    pass


class Registry:
    """Load models one after the other, serve those that pass their self-check, and unload them.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        check: SelfCheck,
        observe: Observer,
        forget: Callable[[str], None] = _forget_nothing,
    ) -> None:
        """Prepare to load `sources`.

        `check` measures a model. `observe` receives each change of state, and `forget` the name of
        a model that is unloaded.
        """
        self._check = check
        self._observe = observe
        self._forget = forget
        self._changed = threading.Condition()  # reentrant
        self._sources = {source.name: source for source in sources}
        self._statuses = {s.name: ModelStatus(s.name, ModelState.LOADING) for s in sources}
        self._progress = {source.name: LoadingProgress() for source in sources}
        self._prepared: dict[str, ModelStatus] = {}  # outcomes that `settle` will report
        self._resident: dict[str, ResidentModel] = {}
        self._users = Counter[str]()
        self._closed = False

    def close(self) -> None:
        """Serve no model from now on, because the server is shutting down."""
        self._closed = True

    def load_all(self) -> None:
        """Load and check every model. A failed model affects only the LoRAs that change it."""
        sources = sorted(self._sources.values(), key=lambda source: source.lora is not None)
        for source in sources:
            self.load(source.name)

    def add(self, source: ModelSource) -> bool:
        """Add a model in the state LOADING, for `load`; return whether it must be loaded.

        It is not loaded again if it is already loading or READY from this location. A FAILED model
        is replaced. Raises `ModelExists` if another model has the name, or the model is being
        unloaded, `InvalidRequest` if there are too many models, and `ServerDraining`.
        """
        self._refuse_when_closed()
        with self._changed:
            known = self._statuses.get(source.name)
            if known is not None and known.state is not ModelState.FAILED:
                before = self._sources[source.name]
                same = (before.location, before.revision) == (source.location, source.revision)
                if same and known.state is not ModelState.UNLOADING:
                    return False
                if known.state is ModelState.UNLOADING:
                    being, advice = "being unloaded", "wait until it is unloaded"
                else:
                    being, advice = "in use", "unload that model first"
                raise ModelExists(
                    f"model name {source.name!r} is {being}; {advice}, or choose another name"
                )
            if known is None and len(self._statuses) >= MAX_MODELS:
                raise InvalidRequest(
                    "model", f"too many models: expected at most {MAX_MODELS}; unload some"
                )
            self._expect(source)
        return True

    def expect(self, source: ModelSource) -> None:
        """Add a model that all processes load, or replace one that does not serve."""
        with self._changed:
            if source.name not in self._resident:
                self._expect(source)
                self._progress[source.name].show_of_all(0.0)

    def _expect(self, source: ModelSource) -> None:
        self._sources[source.name] = source
        self._progress[source.name] = LoadingProgress()
        self._set(ModelStatus(source.name, ModelState.LOADING))

    def load(self, name: str) -> None:
        """Load one model in the state LOADING. If it fails, nothing of it stays in memory."""
        self.prepare(name)
        self.settle(name)

    def prepare(self, name: str) -> str:
        """Load one model, which is reported as LOADING until `settle`.

        Requests for it are already served, because another process may have reported it as READY.
        Returns why the model failed; empty if it did not.
        """
        with self._changed:
            status = self._statuses[name]
            if self._closed or status.state is not ModelState.LOADING:
                return status.reason
            source, progress = self._sources[name], self._progress[name]
        progress.alive()
        status = self._loaded(source, progress)
        with self._changed:
            self._prepared[name] = status
        return status.reason

    def settle(self, name: str, failure: str = "") -> weakref.ref[PreTrainedModel] | None:
        """Report what `prepare` has found, or FAILED because of the `failure` of another process.

        Returns the network that serves no longer because of that failure, for `release`.
        """
        unused = None
        with self._changed:
            status = self._prepared.pop(name, None)
            if failure and name in self._statuses:
                status = ModelStatus(name, ModelState.FAILED, failure)
                model = self._resident.pop(name, None)
                if model is not None:
                    unused = weakref.ref(model.network)
            if status is not None:
                self._progress[name].show_of_all(None)
                self._set(status)
        return unused

    def _loaded(self, source: ModelSource, progress: LoadingProgress) -> ModelStatus:
        try:
            if source.lora is None:
                model = load(source, progress)
            else:
                model = self._with_lora(source, source.lora, progress)
            model, guarantees = self._check(model)
        except ModelFailed as error:
            return ModelStatus(source.name, ModelState.FAILED, str(error))
        except Exception as error:  # a hostile folder can break transformers anywhere
            logger.debug("model %s broke in its self-check", source.name, exc_info=True)
            reason = f"{source.location}: self-check failed: {one_line(error)}"
            return ModelStatus(source.name, ModelState.FAILED, reason)
        return self._admitted(model, guarantees)

    def _with_lora(
        self, source: ModelSource, folder: Path, progress: LoadingProgress
    ) -> ResidentModel:
        """Load a LoRA over a resident model."""
        base = self._resident.get(source.location)
        if base is None:
            raise ModelFailed(f"{folder}: its base, the model {source.location!r}, is not served")
        return load_lora(source.name, folder, base, progress)

    def _admitted(self, model: ResidentModel, guarantees: Sequence[Guarantee]) -> ModelStatus:
        broken = [g for g in guarantees if not g.held]
        reason = "; ".join(guarantee.failure for guarantee in broken)
        if not broken:
            with self._changed:
                self._resident[model.name] = model
        state = ModelState.FAILED if broken else ModelState.READY
        facts, provenance = model.view.facts, model.provenance
        status = ModelStatus(model.name, state, reason, provenance, facts, guarantees)
        return replace(status, levels=model.view.levels)

    def unload(self, name: str) -> None:
        """Remove a model; return when its requests have finished and its memory is free.

        Raises `ModelNotFound`, `ModelLoading` while it loads, and `InvalidRequest` if it is the
        base of a LoRA.
        """
        with self._changed:
            self.check_unloadable(name)
            model = self._resident.pop(name, None)
            self._set(replace(self._statuses[name], state=ModelState.UNLOADING))
            self._changed.wait_for(lambda: not self._users[name])
        if model is not None:
            network = weakref.ref(model.network)
            del model
            release(name, network)
        with self._changed:
            del self._statuses[name], self._sources[name], self._progress[name]
            del self._users[name]
        self._forget(name)

    def check_unloadable(self, name: str) -> None:
        """Raise the error that `unload` would raise, and `ServerDraining`."""
        self._refuse_when_closed()
        status = self.status(name)
        if status.state is ModelState.LOADING and name not in self._resident:
            raise ModelLoading(f"model {name!r} is still loading; wait until it is READY or FAILED")
        if status.state is ModelState.UNLOADING:
            raise ModelNotFound(f"model {name!r} is already being unloaded")
        with self._changed:
            changed = [s.name for s in self._sources.values() if s.lora and s.location == name]
        if changed:
            raise InvalidRequest(
                "model", f"model {name!r} is the base of {_listed(changed)}; unload these first"
            )

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise ServerDraining("the server is shutting down; ask another replica")

    def _set(self, status: ModelStatus) -> None:
        with self._changed:
            self._statuses[status.name] = status
        self._observe(status)

    def alive(self, name: str) -> None:
        """Report that a model is still being loaded, as progress without a fraction."""
        self._progress[name].alive()

    def show_progress_of_all(self, name: str, fraction: float) -> None:
        """Report the share of a model's loading that is done in all processes."""
        if name in self._progress:
            self._progress[name].show_of_all(fraction)

    def own_progress(self, name: str) -> LoadingProgress:
        """The progress of loading a model in this process."""
        return self._progress[name]

    def seconds_without_progress(self, now: float) -> float:
        """Seconds since any loading model last advanced, at `now` of `time.monotonic`.

        0 if none is loading.
        """
        with self._changed:
            moments = [
                self._progress[status.name].last_advanced_at
                for status in self._statuses.values()
                if status.state is ModelState.LOADING
            ]
        return now - max(moments, default=now)

    def bytes_cached_later(self) -> int:
        """Bytes by which the row caches of all models may still grow."""
        with self._changed:
            return sum(model.row_cache_growth for model in self._resident.values())

    def statuses(self) -> list[ModelStatus]:
        """Status of every model, in the order in which they were configured or added."""
        with self._changed:
            return [self._with_fraction(status) for status in self._statuses.values()]

    def _with_fraction(self, status: ModelStatus) -> ModelStatus:
        return replace(status, loaded_fraction=self._progress[status.name].shown)

    def loaded_fraction(self, name: str) -> float:
        """Return the share of a model's loading that is done; 0 for an unknown model."""
        progress = self._progress.get(name)
        return 0.0 if progress is None else progress.shown

    def status(self, name: str, scope: Scope = _everything) -> ModelStatus:
        """Return the status of one model; an empty name is that of `_default`.

        Raises `InvalidRequest`, `PermissionDenied` and `ModelNotFound` as `using` does.
        """
        statuses = {status.name: status for status in self.statuses()}
        offered = [known for known in statuses if scope(known)]
        name = name or _default([statuses[known] for known in offered])
        if not scope(name):
            raise PermissionDenied(
                f"model {name!r} is not permitted: expected one of {_listed(offered)}"
            )
        if name not in statuses:
            raise ModelNotFound(f"unknown model {name!r}: expected one of {_listed(offered)}")
        return statuses[name]

    @contextmanager
    def using(
        self, name: str, revision: str = "", scope: Scope = _everything
    ) -> Iterator[ResidentModel]:
        """Yield the model to serve, as `get` returns it; it stays in memory meanwhile."""
        with self._changed:
            model = self.get(name, revision, scope)
            self._users[model.name] += 1
        try:
            yield model
        finally:
            with self._changed:
                self._users[model.name] -= 1
                self._changed.notify_all()

    def get(self, name: str, revision: str = "", scope: Scope = _everything) -> ResidentModel:
        """Return the model to serve.

        Args:
            name: The model's name; empty for the only one that serves, see `_default`.
            revision: The expected revision; empty for any.
            scope: Whether the caller may use a name.

        Raises:
            InvalidRequest: The name is empty and several models serve.
            PermissionDenied: The name is not permitted, whether or not it exists.
            ModelNotFound: The name is unknown, or the model is being unloaded.
            RevisionNotFound: The model has another revision.
            ModelLoading: The model is still loading.
            ModelFailed: The model could not be loaded or failed its self-check.
            ServerDraining: The registry is closed.
        """
        self._refuse_when_closed()
        with self._changed:
            status = self.status(name, scope)
            name = status.name
            if status.state is ModelState.LOADING and name not in self._resident:
                raise ModelLoading(f"model {name!r} is still loading")
            if status.state is ModelState.FAILED:
                raise ModelFailed(f"model {name!r} cannot be served: {status.reason}")
            if status.state is ModelState.UNLOADING:
                raise ModelNotFound(f"model {name!r} is being unloaded; use another model")
            model = self._resident[name]
        if revision and revision != model.provenance.revision:
            raise RevisionNotFound(
                f"unknown revision {revision!r} of model {name!r}: expected "
                f"{model.provenance.revision!r}"
            )
        return model


def release(name: str, network: weakref.ref[PreTrainedModel]) -> None:
    """Free the memory of a model that is no longer used.

    Each collection stops the whole process for some 0.2 s, so the time between two of them doubles.
    """
    latest, pause = time.monotonic() + RELEASE_SECONDS, COLLECTION_SECONDS
    tuning.release_objects()
    while network() is not None:
        if time.monotonic() > latest:
            logger.warning("model %s is unloaded, but its memory is still in use", name)
            break
        time.sleep(pause)
        pause *= 2
        tuning.release_objects()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _default(offered: list[ModelStatus]) -> str:
    """Return the model of a request that names none: the only one that serves or is loading.

    A loading model counts, so that the answer does not depend on which model is loaded first. If
    no model serves or is loading, the only other one is returned, so that the error has its reason.
    """
    usable = {ModelState.LOADING, ModelState.READY}
    found = [status.name for status in offered if status.state in usable]
    names = found or [status.name for status in offered]
    if len(names) == 1:
        return names[0]
    if not names:
        raise PermissionDenied("no model is permitted for this caller")
    raise InvalidRequest("model", f"no model given: expected one of {_listed(names)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no model"

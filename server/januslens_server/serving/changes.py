"""Load and unload models at run time, from the sources that the operator allows."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

from januslens_server.config import Change, Load, ModelLocation, Unload, name_of
from januslens_server.errors import IntrospectionError, PermissionDenied
from januslens_server.models.loader import ModelSource
from januslens_server.models.registry import Registry, release

logger = logging.getLogger("januslens_server")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class AllowedSources:
    """The folders and hub models that may be loaded at run time."""

    def __init__(self, loadable: Sequence[str]) -> None:
        """`loadable` has absolute paths of folders, and hub ids such as `org/name` or `org/*`."""
        self._loadable = loadable
        self._folders = [Path(entry) for entry in loadable if entry.startswith("/")]

    def checked(self, source: str) -> str:
        """Return an allowed source: a path without links, or a hub id.

        Raises `PermissionDenied` otherwise, whether or not the source exists.
        """
        if source.startswith("/"):
            path = _resolved(source)
            if path is not None and any(map(path.is_relative_to, self._folders)):
                return str(path)
        elif _HUB_ID.fullmatch(source) and not Path(source).exists() and self._lists(source):
            return source
        if self._loadable:
            allowed = f"an absolute path or a hub id within: {', '.join(self._loadable)}"
        else:
            allowed = "a server with --loadable, which lists the allowed folders and hub ids"
        raise PermissionDenied(f"source {source!r} is not allowed; expected {allowed}")

    def _lists(self, hub_id: str) -> bool:
        """Whether a hub id is listed, or all models of its organisation."""
        organisation = hub_id.partition("/")[0]
        return hub_id in self._loadable or f"{organisation}/*" in self._loadable


def _resolved(source: str) -> Path | None:
    """Return a path without links; None if its links form a loop."""
    try:
        return Path(source).resolve()
    except (OSError, RuntimeError):
        return None


class Changes:
    """Applies changes to the models of this process.

    With several processes, `relay` sends a change to the supervisor. It orders the changes, and
    calls `announce` and then `apply` in every process, this one included, and at last `settle`.
    A model that is loaded is READY from then on, so that no caller sees it as READY too early.
    """

    def __init__(
        self,
        registry: Registry,
        source_of: Callable[[ModelLocation], ModelSource],
        allowed: AllowedSources,
    ) -> None:
        """Must be called in the event loop; `source_of` adds the settings that all models share."""
        self._registry = registry
        self._source_of = source_of
        self._allowed = allowed
        self._loop = asyncio.get_running_loop()
        self._loads: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._unloads: dict[str, asyncio.Future[None]] = {}
        self.relay: Callable[[Change], None] | None = None
        threading.Thread(target=self._run_loads, name="model-loader", daemon=True).start()

    def _run_loads(self) -> None:
        while True:
            self._loads.get()()

    def run_load(self, work: Callable[[], None]) -> None:
        """Run `work` in the thread that loads models, one after another."""
        self._loads.put(work)

    async def load(self, name: str, source: str, revision: str) -> None:
        """Add a model and begin to load it, as `rpc.admin.ModelChanges` describes."""
        location = ModelLocation(name, self._allowed.checked(source), revision or None)
        change = Load(location)
        new = self._registry.add(self._source_of(location))
        if not new:
            return
        if self.relay is not None:
            self.relay(change)
        else:
            self.apply(change, lambda _failure: self.settle(change))

    async def unload(self, name: str) -> None:
        """Remove a model, as `rpc.admin.ModelChanges` describes."""
        self._registry.check_unloadable(name)
        if name not in self._unloads:
            self._unloads[name] = self._loop.create_future()
            change = Unload(name)
            if self.relay is not None:
                self.relay(change)
            else:
                self.apply(change, lambda _failure: self.settle(change))
        await asyncio.shield(self._unloads[name])

    def announce(self, location: ModelLocation) -> None:
        """Add a model that the supervisor will order to load; requests for it wait until then."""
        self._registry.expect(self._source_of(location))

    def apply(self, change: Change, done: Callable[[str], None]) -> None:
        """Apply a change in a thread, and then call `done` in the event loop.

        `done` receives why the model could not be loaded; empty if it could.
        """
        if isinstance(change, Load):
            self.run_load(lambda: self._load(name_of(change), done))
        else:
            threading.Thread(target=self._unload, args=(change.name, done), daemon=True).start()

    def _load(self, name: str, done: Callable[[str], None]) -> None:
        self._loop.call_soon_threadsafe(done, self._registry.prepare(name))

    def _unload(self, name: str, done: Callable[[str], None]) -> None:
        try:
            self._registry.unload(name)
        except IntrospectionError as error:  # a change from another process came first
            logger.warning("model %s not changed: %s", name, error)
        self._loop.call_soon_threadsafe(done, "")

    def settle(self, change: Change, failure: str = "") -> None:
        """Report that every process has applied a change, or why one could not load the model."""
        name = name_of(change)
        if isinstance(change, Load):
            unused = self._registry.settle(name, failure)
            if unused is not None:
                self.run_load(lambda: release(name, unused))
        elif name in self._unloads:
            self._unloads.pop(name).set_result(None)

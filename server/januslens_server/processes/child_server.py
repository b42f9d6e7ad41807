"""Serve in a child process: load models, open the port on command, and serve."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from januslens_server import gauges
from januslens_server.config import Change, Load, ModelLocation, ServerSettings, name_of
from januslens_server.models.progress import LoadingProgress
from januslens_server.processes.child import (
    Announce,
    Applied,
    Apply,
    Asked,
    Command,
    Instruction,
    Listening,
    Loaded,
    Progress,
    Settle,
    Stalled,
)
from januslens_server.processes.metric_files import remove_model
from januslens_server.results import ModelState
from januslens_server.serving.assembly import Assembly
from januslens_server.serving.ports import add_port

DEVICE_LOST = 1

# Seconds between two reports of the progress of loading.
PROGRESS_SECONDS = 0.25


async def serve_as_child(
    number: int,
    settings: ServerSettings,
    pipe: Connection,
    folder: Path,
    models: Sequence[ModelLocation] | None,
) -> int:
    """Serve until SIGTERM or until the device is lost, then drain; return the exit status.

    Raises `OSError` if serving is not possible.
    """
    assembly = Assembly(settings, models)
    assembly.changes.relay = lambda change: pipe.send(Asked(change))
    assembly.on_forget = remove_model
    assembly.on_stall = lambda stalled: pipe.send(Stalled(number, stalled))
    opened = _follow_supervisor(pipe, folder, assembly)
    assembly.load()
    written = asyncio.create_task(gauges.keep_written())
    served = asyncio.create_task(_serve(assembly, settings, pipe, opened))
    stopped = asyncio.create_task(assembly.stop.wait())
    await asyncio.wait({served, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if served.done():
        served.result()  # raises the error, if any
    served.cancel()
    written.cancel()
    await assembly.drain()
    return DEVICE_LOST if assembly.lost.is_set() else 0


async def _serve(
    assembly: Assembly, settings: ServerSettings, pipe: Connection, opened: asyncio.Event
) -> None:
    """Wait for the models, open the port on command, and return when the device is lost."""
    await assembly.loaded.wait()
    statuses = assembly.registry.statuses()
    states = {status.name: status.state is ModelState.READY for status in statuses}
    pipe.send(Loaded(states, {model.name: model for model in assembly.models}))
    await opened.wait()
    add_port(assembly.server, settings)
    await assembly.server.start()
    assembly.announce()
    pipe.send(Listening())
    await assembly.lost.wait()


def _follow_supervisor(pipe: Connection, folder: Path, assembly: Assembly) -> asyncio.Event:
    """Follow the supervisor's commands in a thread; return the event that `OPEN` sets.

    If the supervisor ends, this process exits.
    """
    opened, loop = asyncio.Event(), asyncio.get_running_loop()

    def follow() -> None:
        try:
            while True:
                loop.call_soon_threadsafe(_obey, pipe.recv(), pipe, assembly, opened)
        except (EOFError, OSError):  # the supervisor was killed and could not remove the folder
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)

    threading.Thread(target=follow, name="supervisor", daemon=True).start()
    return opened


def _obey(
    command: Instruction, pipe: Connection, assembly: Assembly, opened: asyncio.Event
) -> None:
    match command:
        case Command.OPEN:
            opened.set()
        case Command.RELOAD:
            assembly.reload_callers()
        case Announce():
            assembly.changes.announce(command.location)
        case Apply():
            _apply(command.change, pipe, assembly)
        case Progress():
            assembly.registry.show_progress_of_all(command.name, command.fraction)
        case Settle():
            assembly.changes.settle(command.change, command.failure)


def _apply(change: Change, pipe: Connection, assembly: Assembly) -> None:
    """Apply a change, and report the progress of a load and the end to the supervisor."""
    name, reports = name_of(change), None
    if isinstance(change, Load):
        progress = assembly.registry.own_progress(name)
        reports = asyncio.create_task(_report_progress(pipe, name, progress))

    def done(failure: str) -> None:
        if reports is not None:
            reports.cancel()
        pipe.send(Applied(name, failure))

    assembly.changes.apply(change, done)


async def _report_progress(pipe: Connection, name: str, progress: LoadingProgress) -> None:
    """Report how much of a model is loaded whenever its loading has advanced, until cancelled."""
    reported = None
    while True:
        if progress.advanced_at != reported:
            reported = progress.advanced_at
            pipe.send(Progress(name, progress.fraction))
        await asyncio.sleep(PROGRESS_SECONDS)

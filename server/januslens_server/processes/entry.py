"""Where a member begins: what must be so before anything else is imported."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from prometheus_client import values

from januslens_server import tracing
from januslens_server.config import ServerSettings
from januslens_server.logs import configure_logging


def enter(number: int, settings: ServerSettings, folder: Path, pipe: Connection) -> None:
    """Serve as one of several, as this process's whole life."""
    # A terminal's Ctrl-C reaches every process; the supervisor says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _count_in(folder, number)
    configure_logging(settings.log_level, settings.log_format, number)
    tracing.configure()
    from januslens_server.processes.serving import serve_among  # noqa: PLC0415 - imports metrics
    from januslens_server.serving.life import live  # noqa: PLC0415 - likewise

    live(serve_among(settings, pipe, folder))


def _count_in(folder: Path, number: int) -> None:
    """Keep every metric in files of this number: who takes another's place counts on from there."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]  # as shipped

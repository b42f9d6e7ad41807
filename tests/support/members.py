"""The processes of a server with several processes, as the operating system lists them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.server import ServerProcess

PROC = Path("/proc")
SERVED_BY = re.compile(r" process=(\d+)")


def members(server: ServerProcess) -> list[int]:
    """Return the ids of the processes that serve, oldest first."""
    running = [entry for entry in PROC.iterdir() if entry.name.isdigit()]
    children = [entry for entry in running if _status(entry)[1:] == [str(server.process.pid)]]
    # multiprocessing starts one more process, which tracks resources.
    serving = [child for child in children if b"spawn_main" in (child / "cmdline").read_bytes()]
    return sorted(int(child.name) for child in serving)


def _status(entry: Path) -> list[str]:
    """Return the state and the parent; empty for a process that does not exist."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def wait_until_gone(ids: Sequence[int], seconds: float) -> None:
    """Wait until none of these processes runs; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while running := [i for i in ids if _status(PROC / str(i))[:1] not in ([], ["Z"])]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{running} still run after {seconds:g} s")
        time.sleep(0.02)


def served_by(server: ServerProcess, request_id: str) -> int:
    """Return the number of the process that logged this request."""
    server.wait_for(f" id={request_id} ")
    (line,) = (line for line in server.lines if f" id={request_id} " in line)
    match = SERVED_BY.search(line)
    if match is None:
        raise LookupError(f"expected the number of a process in {line}")
    return int(match[1])

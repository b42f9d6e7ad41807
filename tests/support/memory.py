"""Memory and resources of a server's process."""

from __future__ import annotations

from pathlib import Path

from tests.support.server import ServerProcess

PAGE = 4096


def resident_bytes(server: ServerProcess) -> int:
    """Return the resident memory of a process, including shared libraries."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * PAGE


def open_files(server: ServerProcess) -> int:
    """Return the number of open descriptors: sockets, files, pipes."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

"""Memory and resources of a server's process."""

from __future__ import annotations

from pathlib import Path

PAGE = 4096


def resident_bytes(process: int) -> int:
    """Return the resident memory of a process, including shared libraries."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * PAGE


def open_files(process: int) -> int:
    """Return the number of open descriptors: sockets, files, pipes."""
    return len(list(Path(f"/proc/{process}/fd").iterdir()))

"""Find callers by token, in a callers' file that is reloaded when it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from januslens_server.access.callers import (
    ANY_ADMIN,
    ANYONE,
    Caller,
    find_token,
    read_callers,
)
from januslens_server.errors import Unauthenticated

logger = logging.getLogger(__name__)

# Seconds between two checks of the callers' file.
CHECK_INTERVAL = 1.0


class Directory(Protocol):
    """Finds callers by their tokens."""

    def caller(self, token: str | None) -> Caller:
        """Return the caller with this token. Raises `Unauthenticated` if there is none."""


class OpenDirectory:
    """Accepts every request, for a server without a callers' file."""

    def __init__(self, *, admin: bool = False) -> None:
        """With `admin`, every caller may load and unload models."""
        self._anyone = ANY_ADMIN if admin else ANYONE

    def caller(self, _token: str | None) -> Caller:
        """Return the caller of all requests, which has no name."""
        return self._anyone


class CallersFile:
    """The callers of a file, which is reloaded when it changes.

    While the file is invalid, the last valid callers are used, and the errors are logged.
    """

    def __init__(
        self,
        path: Path,
        rpcs: Collection[str],
        observe: Callable[[bool], object] = lambda _read: None,
    ) -> None:
        """Read the file. Raises `OSError` or `ValueError` if it is invalid.

        `observe` receives, after each read, whether the file was valid.
        """
        self._path = path
        self._observe = observe
        self._rpcs = rpcs
        self._stamp = self._read_stamp()
        self._callers = read_callers(path, rpcs)
        observe(True)

    def caller(self, token: str | None) -> Caller:
        """Return the caller with this token. Raises `Unauthenticated` if there is none."""
        if not token:
            raise Unauthenticated(
                "missing bearer token; send the metadata 'authorization: Bearer <token>'"
            )
        found = find_token(token, self._callers)
        if found is None:
            raise Unauthenticated("invalid bearer token; ask the operator for a valid one")
        caller, known = found
        if known.expires is not None and datetime.now(UTC) >= known.expires:
            raise Unauthenticated(
                f"bearer token expired on {known.expires:%Y-%m-%d}; ask the operator for a new one"
            )
        return caller

    async def watch(self) -> None:
        """Reload the file whenever it changes, forever."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            self.reload_if_changed()

    def reload_if_changed(self) -> None:
        """Reload the file if its time, size or inode differs from the last read."""
        try:
            changed = self._read_stamp() != self._stamp
        except OSError:
            changed = True  # the file does not exist; reading it logs the error
        if changed:
            self.reload()

    def reload(self) -> None:
        """Read the file again, whether or not it has changed."""
        try:
            self._stamp = self._read_stamp()
            self._callers = read_callers(self._path, self._rpcs)
        except (OSError, ValueError) as error:
            for line in str(error).splitlines():
                logger.error("callers not reloaded: %s", line)  # noqa: TRY400 - the line is enough
            self._observe(False)
        else:
            self._observe(True)
            logger.info("callers reloaded: %d from %s", len(self._callers), self._path)

    def _read_stamp(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

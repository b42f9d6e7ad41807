"""From a token to its caller, by a file that may change while the server runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from januslens_server.access.callers import ANYONE, Caller
from januslens_server.access.file import read_callers
from januslens_server.access.tokens import holder
from januslens_server.errors import Unauthenticated

logger = logging.getLogger(__name__)

# How long a change of the file may go unnoticed, in seconds.
LOOK_AGAIN = 1.0


class Directory(Protocol):
    """Knows callers by their tokens."""

    def caller(self, token: str | None) -> Caller:
        """Whose token this is. Raises `Unauthenticated` where it is nobody's."""


class Open:
    """Lets anyone ask for anything: a server without a list of callers."""

    def caller(self, _token: str | None) -> Caller:
        """Anyone."""
        return ANYONE


class CallersFile:
    """The callers of a file, read again when it changes.

    A file that cannot be used leaves the last one that could in force, with a line in the log.
    """

    def __init__(self, path: str, rpcs: Collection[str]) -> None:
        """Read it. Raises `OSError` or `ValueError` where it cannot be used."""
        self._path = Path(path)
        self._rpcs = rpcs
        self._stamp = self._stamped()
        self._looked = time.monotonic()
        self._callers = read_callers(self._path, rpcs)

    def caller(self, token: str | None) -> Caller:
        """Whose token this is. Raises `Unauthenticated` where it is nobody's."""
        if time.monotonic() - self._looked > LOOK_AGAIN:
            self._look_again()
        if not token:
            raise Unauthenticated("expected metadata `authorization: Bearer <token>`, got none")
        found = holder(token, self._callers)
        if found is None:
            raise Unauthenticated("expected a token of a caller of this server, got another one")
        caller, kept = found
        if kept.expires is not None and datetime.now(UTC) >= kept.expires:
            raise Unauthenticated(f"the token expired on {kept.expires:%Y-%m-%d}; ask for another")
        return caller

    def reload(self) -> None:
        """Read the file again, changed or not."""
        try:
            self._stamp = self._stamped()
            self._callers = read_callers(self._path, self._rpcs)
        except (OSError, ValueError) as error:
            logger.error("callers not replaced: %s", error)  # noqa: TRY400 - one line says it all
        else:
            logger.info("callers replaced: %d of %s", len(self._callers), self._path)

    def _look_again(self) -> None:
        self._looked = time.monotonic()
        try:
            changed = self._stamped() != self._stamp
        except OSError:
            changed = True  # gone: reading it says so
        if changed:
            self.reload()

    def _stamped(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

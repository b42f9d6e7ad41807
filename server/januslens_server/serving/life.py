"""A process from its settings to its exit status."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn

from januslens_server import tracing


def live(serving: Coroutine[Any, Any, int | None]) -> NoReturn:
    """Run until it is over, and leave with the status that it gives; with 1 if it cannot begin."""
    try:
        status = asyncio.run(serving)
    except OSError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"januslens-server: {line}\n")
        raise SystemExit(1) from error
    # A thread that loads or computes cannot be stopped inside native code, and would turn an
    # orderly exit into an abort.
    tracing.shutdown()
    logging.shutdown()
    os._exit(status or 0)

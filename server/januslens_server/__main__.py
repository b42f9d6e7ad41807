"""The command `januslens-server`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from januslens_server import tracing
from januslens_server.config import read_settings
from januslens_server.logs import configure_logging


def main() -> None:
    """Read the settings, serve, and leave."""
    settings = read_settings()
    # After the settings: torch takes seconds to import, which no one with a typo should wait.
    from januslens_server.serving.alone import serve  # noqa: PLC0415

    configure_logging(settings.log_level, settings.log_format)
    tracing.configure()
    try:
        asyncio.run(serve(settings))
    except OSError as error:
        sys.stderr.write(f"januslens-server: {error}\n")
        raise SystemExit(1) from error
    # A thread that loads or computes cannot be stopped inside native code, and would turn an
    # orderly exit into an abort.
    tracing.shutdown()
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()

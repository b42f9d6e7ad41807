"""The command `januslens-server`."""

from __future__ import annotations

import logging

from januslens_server import spans
from januslens_server.config import read_settings, unknown_variable_warnings
from januslens_server.logs import configure_logging
from januslens_server.openmp import let_waiting_threads_sleep

logger = logging.getLogger("januslens_server")


def main() -> None:
    """Read the settings, serve, and leave."""
    settings = read_settings()
    configure_logging(settings.log_level, settings.log_format)
    for warning in unknown_variable_warnings():
        logger.warning(warning)
    let_waiting_threads_sleep()
    # After the settings: torch takes seconds to import, which no one with a typo should wait.
    from januslens_server.serving.process import live  # noqa: PLC0415

    if settings.processes > 1:
        from januslens_server.processes.supervisor import supervise  # noqa: PLC0415

        live(supervise(settings))
    from januslens_server.serving.assembly import serve  # noqa: PLC0415

    spans.configure()
    live(serve(settings))


if __name__ == "__main__":
    main()

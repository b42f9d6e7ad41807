"""The command `januslens-server`."""

from __future__ import annotations

import logging

from januslens_server import spans
from januslens_server.config import read_settings, unknown_variable_warnings
from januslens_server.logs import configure_logging
from januslens_server.tuning import limit_spinning

logger = logging.getLogger("januslens_server")


def main() -> None:
    """Read the settings and serve until a signal."""
    settings = read_settings()
    configure_logging(settings.log_level, settings.log_format)
    for warning in unknown_variable_warnings():
        logger.warning(warning)
    limit_spinning()
    # Imported after the settings are valid, since torch takes seconds to import.
    from januslens_server.serving.process import run_process  # noqa: PLC0415

    if settings.processes > 1:
        from januslens_server.processes.supervisor import supervise  # noqa: PLC0415

        run_process(supervise(settings))
    from januslens_server.serving.assembly import serve  # noqa: PLC0415

    spans.configure()
    run_process(serve(settings))


if __name__ == "__main__":
    main()

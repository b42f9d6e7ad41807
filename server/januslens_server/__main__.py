"""The command `januslens-server`."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("januslens_server")


def main() -> None:
    """Read the settings and serve until a signal, or print how to install missing libraries."""
    try:
        _run()
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library.startswith("januslens"):
            raise
        sys.exit(f"januslens-server needs {library}: pip install 'januslens[server]'")


def _run() -> None:
    # Imported here, so that `main` reports a missing library.
    from januslens_server import spans  # noqa: PLC0415
    from januslens_server.config import read_settings, unknown_variable_warnings  # noqa: PLC0415
    from januslens_server.logs import configure_logging  # noqa: PLC0415

    settings = read_settings()
    configure_logging(settings.log_level, settings.log_format)
    for warning in unknown_variable_warnings():
        logger.warning(warning)
    # Imported after the settings are valid, since torch takes seconds to import.
    from januslens_server.serving.process import run_process, stop_with_input  # noqa: PLC0415
    from januslens_server.tuning import limit_spinning, remove_tf32_overrides  # noqa: PLC0415

    limit_spinning()
    for warning in remove_tf32_overrides():
        logger.warning(warning)
    if settings.stop_with_input:
        stop_with_input()
    if settings.processes > 1:
        from januslens_server.processes.supervisor import supervise  # noqa: PLC0415

        run_process(supervise(settings))
    spans.configure()
    from januslens_server.serving.assembly import serve  # noqa: PLC0415

    run_process(serve(settings))


if __name__ == "__main__":
    main()

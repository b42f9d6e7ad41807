"""Format log lines as text or as JSON objects.

Code logs with `logging` and passes fields in `extra`; structlog formats the lines. Control
characters are escaped, so text from callers can neither end a line nor control a terminal.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.dev import Column, ConsoleRenderer, KeyValueColumnFormatter, plain_traceback
from structlog.typing import EventDict, Processor, WrappedLogger

FORMATS = ("text", "json")

# Fields that text lines leave out, since their message contains them.
_IN_MESSAGE = ("method", "status", "address")


def configure_logging(level: str, form: str, process: int | None = None) -> None:
    """Log to standard error in the format `form`; `process` is this process's number, if any."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_FIELDS if process is None else [*_FIELDS, _add_process(process)],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _without_private_fields,
                *(_JSON if form == "json" else _text()),
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


_FIELDS: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.stdlib.ExtraAdder(),
]


def _add_process(number: int) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["process"] = number
        return event

    return add


def _without_private_fields(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Remove fields that a library adds to every record for itself, such as Ray's time stamp."""
    return {name: value for name, value in event.items() if not name.startswith("_")}


_JSON: list[Processor] = [
    structlog.processors.format_exc_info,
    structlog.processors.EventRenamer("message"),
    structlog.processors.JSONRenderer(),
]


def _text() -> list[Processor]:
    """Format text lines: `2026-01-31T12:00:00Z INFO januslens_server: message field=value`."""
    bare = [
        Column(name, KeyValueColumnFormatter(None, "", "", str, postfix=postfix))
        for name, postfix in (("timestamp", ""), ("level", ""), ("logger", ":"), ("event", ""))
    ]
    fields = Column("", KeyValueColumnFormatter("", "", "", _shown))
    renderer = ConsoleRenderer(
        columns=[*bare, fields], sort_keys=False, exception_formatter=plain_traceback
    )
    return [_for_people, structlog.processors.format_exc_info, _escaped, renderer]


def _for_people(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Remove fields that the message contains, and round durations to a tenth of a millisecond."""
    event["level"] = event["level"].upper()
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in event.items()
        if name not in _IN_MESSAGE
    }


def _escaped(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape every field; indent tracebacks, so that none of their lines looks like a log line."""
    escaped = {
        name: escape(value) if isinstance(value, str) else value for name, value in event.items()
    }
    if isinstance(exception := event.get("exception"), str):
        escaped["exception"] = "\n".join(f"  {escape(line)}" for line in exception.split("\n"))
    return escaped


def escape(text: str) -> str:
    """Replace control characters and line ends by Python escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(value: object) -> str:
    """Format a field's value: quoted if it has spaces, and a mapping as `name:value,...`."""
    if isinstance(value, dict):
        return ",".join(f"{name}:{_shown(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return f'"{text.replace(chr(34), chr(39))}"' if " " in text or not text else text

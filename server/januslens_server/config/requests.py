"""How much may be asked for, and how long it may take."""

from __future__ import annotations

import click

from januslens_server.config.types import SizeType, option

REQUESTS: tuple[click.Parameter, ...] = (
    option(
        "--max-waiting",
        type=click.IntRange(min=1),
        default=64,
        help="Requests that may wait for the device before further ones are refused.",
    ),
    option(
        "--max-request-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=600.0,
        help="Seconds of the device that one request may be estimated at.",
    ),
    option(
        "--max-request-memory",
        type=SizeType(),
        default="16GiB",
        help="Bytes on the device, beside the weights, that one request may be estimated at.",
    ),
    option(
        "--max-request-stream",
        type=SizeType(),
        default="2GiB",
        help="Bytes of answer that one request may be estimated at.",
    ),
    option(
        "--stall-seconds",
        type=click.FloatRange(min=0.1),
        default=60.0,
        help="A stream whose reader takes nothing for this long is aborted.",
    ),
    option(
        "--grace-seconds",
        type=click.FloatRange(min=0),
        default=30.0,
        help="On SIGTERM, how long running requests may take to finish.",
    ),
    option(
        "--max-connection-age-seconds",
        type=click.FloatRange(min=1),
        default=None,
        help="After which a connection takes no further calls, so that its client looks again "
        "for servers; streams on it come to their end.",
    ),
)

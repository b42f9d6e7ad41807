"""What the log says, and how."""

from __future__ import annotations

import click

from januslens_server.config.types import option
from januslens_server.logs import FORMATS

LOG_LEVELS = ("debug", "info", "warning", "error")

LOG: tuple[click.Parameter, ...] = (
    option("--log-level", type=click.Choice(LOG_LEVELS), default="info"),
    option(
        "--log-format",
        type=click.Choice(FORMATS),
        default="text",
        help="Lines for people, or one JSON object a line.",
    ),
    option(
        "--log-prompts",
        is_flag=True,
        default=False,
        help="Put every request's prompt into the log.",
    ),
)

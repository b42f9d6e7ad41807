"""From flags, environment and file to settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from januslens_server.config.about import ABOUT
from januslens_server.config.exposure import check_exposure
from januslens_server.config.log import LOG
from januslens_server.config.models import MODELS
from januslens_server.config.network import NETWORK
from januslens_server.config.requests import REQUESTS
from januslens_server.config.settings import Settings, as_yaml

ENVIRONMENT_PREFIX = "JANUSLENS"


def settings_command() -> click.Command:
    """`januslens-server`, with every option in the order of docs/operations.md."""
    return click.Command(
        "januslens-server",
        params=[*NETWORK, *MODELS, *REQUESTS, *LOG, *ABOUT],
        callback=_from_options,
        help="Serve causal language models for introspection over gRPC.",
        context_settings={
            "auto_envvar_prefix": ENVIRONMENT_PREFIX,
            "show_default": True,
            "max_content_width": 100,
        },
    )


def _from_options(print_config: bool, **values: Any) -> Settings:
    settings = Settings(**values)
    names = [model.name for model in settings.models]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise click.BadParameter(f"expected a name of its own for each model, got {twice[0]} twice")
    check_exposure(settings)
    if print_config:
        click.echo(as_yaml(settings), nl=False)
        raise SystemExit(0)
    return settings


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from `arguments` (default: the command line), environment and file.

    Ends the process: after `--help` or `--print-config` with 0; with 2 and one readable line on
    standard error for a setting that cannot be used.
    """
    command = settings_command()
    try:
        settings = command.main(
            args=None if arguments is None else list(arguments), standalone_mode=False
        )
    except click.ClickException as error:
        click.echo(f"januslens-server: {error.format_message()}", err=True)
        raise SystemExit(error.exit_code) from error
    if not isinstance(settings, Settings):  # --help was asked for
        raise SystemExit(0)
    return settings

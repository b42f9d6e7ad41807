"""Options that are no settings: where these come from, and what is printed instead of serving."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import click
import yaml

from januslens_server.access.callers import NAME
from januslens_server.access.tokens import digest, new_token
from januslens_server.config.settings import Settings


def _read_file(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Make the file's values the defaults of all other options."""
    if path is None:
        return
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        one_line = " ".join(str(error).split())
        raise click.BadParameter(f"{path}: {one_line}") from error
    known = {field.name for field in fields(Settings)}
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path}: expected settings by name, got {values!r}")
    if unknown := [key for key in values if key not in known]:
        raise click.BadParameter(f"{path}: expected some of {sorted(known)}, got {unknown}")
    # A setting without a value keeps its default.
    ctx.default_map = {name: value for name, value in values.items() if value is not None}


def _make_token(_ctx: click.Context, _param: click.Parameter, name: str | None) -> None:
    """Print a token once, and what the file of callers keeps of it; then end."""
    if name is None:
        return
    if not NAME.fullmatch(name):
        raise click.BadParameter(f"expected 1 to 64 letters, digits, _ . : -, got {name!r}")
    token = new_token()
    entry = {"callers": [{"name": name, "tokens": [{"sha256": digest(token).hex()}]}]}
    click.echo(token)
    click.echo(yaml.safe_dump(entry, sort_keys=False), err=True, nl=False)
    raise SystemExit(0)


ABOUT: tuple[click.Parameter, ...] = (
    click.Option(
        ["--make-token"],
        metavar="NAME",
        expose_value=False,
        is_eager=True,
        callback=_make_token,
        help="Print a new token for this caller, and on standard error its entry in --callers.",
    ),
    click.Option(["--print-config"], is_flag=True, help="Print the settings and exit."),
    click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_file,
        help="YAML file with any of these settings, by name with underscores.",
    ),
)

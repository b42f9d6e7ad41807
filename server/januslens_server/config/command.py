"""The command line of `januslens-server`: read flags, environment and file, and report errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from januslens_server.access.callers import NAME, new_token, token_hash
from januslens_server.config.settings import ENVIRONMENT_PREFIX, ServerSettings, as_yaml
from januslens_server.validation import expectation, load_yaml, suggestion

PROGRAM = "januslens-server"
# Variables with the same prefix that belong to the `januslens` client.
CLIENT_VARIABLES = {"JANUSLENS_SERVER", "JANUSLENS_TOKEN", "JANUSLENS_ROOT_CERTIFICATES"}


def settings_command() -> click.Command:
    """Create the `januslens-server` command, with options in the order of docs/operations.md."""
    return click.Command(
        PROGRAM,
        params=[*(_option(*item) for item in ServerSettings.model_fields.items()), *_OTHER_OPTIONS],
        callback=_settings_from,
        help="Serve causal language models for introspection over gRPC.",
        epilog="Each setting can also be given as an environment variable JANUSLENS_<NAME>, such as"
        " JANUSLENS_MAX_WAITING, or as a key of the --config file, such as max_waiting. Flags"
        " override variables, which override the file.",
        context_settings={"max_content_width": 100},
    )


def read_settings(arguments: Sequence[str] | None = None) -> ServerSettings:
    """Read the settings from `arguments` (default: the command line), environment and file.

    Exits with status 0 after `--help`, `--version` and `--print-config`, and with status 2 and one
    line per error on standard error if a setting is invalid.
    """
    command = settings_command()
    try:
        settings = command.main(
            args=None if arguments is None else list(arguments),
            prog_name=PROGRAM,
            standalone_mode=False,
        )
    except click.ClickException as error:
        for line in error.format_message().splitlines():
            click.echo(f"{PROGRAM}: {line}", err=True)
        raise SystemExit(error.exit_code) from error
    if not isinstance(settings, ServerSettings):  # --help or --version was given
        raise SystemExit(0)
    return settings


def unknown_variable_warnings() -> Iterator[str]:
    """Return a warning for each environment variable with our prefix that is not a setting."""
    names = [*ServerSettings.model_fields, "config"]
    known = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in names}
    for name in sorted(os.environ):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known | CLIENT_VARIABLES:
            yield f"unknown environment variable {name!r} is ignored{suggestion(name, known)}"


def _option(name: str, field: FieldInfo) -> click.Option:
    """Create the flag of one setting; pydantic parses its text."""
    repeatable = get_origin(field.annotation) is tuple
    shown = "" if field.default in (None, False, ()) else f"  [default: {field.default}]"
    return click.Option(
        [flag_of(name), name],
        is_flag=field.annotation is bool,
        multiple=repeatable,
        default=None,
        type=bool if field.annotation is bool else str,
        metavar=_metavar(field),
        help=f"{field.description}{shown}",
    )


def flag_of(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--model" if name == "models" else f"--{name.replace('_', '-')}"


def _metavar(field: FieldInfo) -> str | None:
    if get_origin(field.annotation) is Literal:
        return f"[{'|'.join(get_args(field.annotation))}]"
    extra = field.json_schema_extra
    return str(extra["metavar"]) if isinstance(extra, dict) and extra["metavar"] else None


def _settings_from(config: Path | None, print_config: bool, **options: Any) -> ServerSettings:
    flags = {name: value for name, value in options.items() if value not in (None, ())}
    content = {} if config is None else _read_file(config)
    try:
        settings = ServerSettings(**(flags | {"from_file": content}))
    except ValidationError as error:
        lines = [
            _one_line(_origin(details["loc"], flags, config), details)
            for details in error.errors(include_url=False)
        ]
        raise click.UsageError("\n".join(lines)) from error
    if print_config:
        click.echo(as_yaml(settings), nl=False)
        raise SystemExit(0)
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(path) or {}
    except OSError as error:
        raise click.UsageError(f"cannot read --config: {error}") from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not isinstance(values, dict):
        raise click.UsageError(f"{path}: invalid content {values!r}; expected settings by name")
    known = ServerSettings.model_fields
    if unknown := [name for name in values if name not in known]:
        raise click.UsageError(
            f"{path}: unknown setting {unknown[0]!r}{suggestion(str(unknown[0]), known)}"
        )
    # A setting without a value keeps its default.
    return {name: value for name, value in values.items() if value is not None}


def _origin(location: tuple[int | str, ...], flags: dict[str, Any], config: Path | None) -> str:
    """Return the flag, variable or place in the file that an invalid value comes from."""
    name = str(location[0]) if location else ""
    if not name or name in flags:
        return flag_of(name)
    variable = f"{ENVIRONMENT_PREFIX}{name.upper()}"
    return variable if os.environ.get(variable) else f"{name} in {config}"


def _one_line(origin: str, error: Any) -> str:
    if not error["loc"]:  # a rule between settings
        return expectation(error)
    return f"invalid {origin} {error['input']!r}: {expectation(error)}"


def _print_token(_ctx: click.Context, _param: click.Parameter, name: str | None) -> None:
    """Print a new token to standard output, and its entry in the callers' file to stderr."""
    if name is None:
        return
    if not NAME.fullmatch(name):
        raise click.BadParameter(
            f"invalid name {name!r}; expected 1 to 64 letters, digits, _ . : -"
        )
    token = new_token()
    entry = {"callers": [{"name": name, "tokens": [{"sha256": token_hash(token).hex()}]}]}
    click.echo(token)
    click.echo(yaml.safe_dump(entry, sort_keys=False), err=True, nl=False)
    raise SystemExit(0)


def _print_version(_ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"{PROGRAM} {version('januslens')}")
        raise SystemExit(0)


_OTHER_OPTIONS: tuple[click.Parameter, ...] = (
    click.Option(
        ["--make-token"],
        metavar="NAME",
        expose_value=False,
        is_eager=True,
        callback=_print_token,
        help="Print a new token for a caller, and its --callers entry on standard error.",
    ),
    click.Option(["--print-config"], is_flag=True, help="Print the settings as YAML and exit."),
    click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        envvar=f"{ENVIRONMENT_PREFIX}CONFIG",
        metavar="FILE",
        help="YAML file of settings; its keys are the flags' names with underscores.",
    ),
    click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_print_version,
        help="Print the version and exit.",
    ),
)

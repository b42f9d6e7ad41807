"""The only reader of flags, environment and configuration files.

A setting comes from its flag, else from `JANUSLENS_<NAME>`, else from the YAML file named by
`--config`, else from its default.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import yaml

from januslens_server.access.callers import NAME
from januslens_server.access.tokens import digest, new_token
from januslens_server.logs import FORMATS

ENVIRONMENT_PREFIX = "JANUSLENS"
LOG_LEVELS = ("debug", "info", "warning", "error")
DATA_TYPES = ("auto", "float32", "bfloat16", "float16")
SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]i?)?B?")


@dataclass(frozen=True)
class ModelSetting:
    """One `NAME=PATH_OR_HUB_ID[@REVISION]`."""

    name: str
    location: str
    revision: str | None

    def __str__(self) -> str:
        suffix = f"@{self.revision}" if self.revision else ""
        return f"{self.name}={self.location}{suffix}"


@dataclass(frozen=True)
class MemorySetting:
    """One `DEVICE=SIZE`, the size in bytes."""

    device: str
    size: int

    def __str__(self) -> str:
        return f"{self.device}={self.size}"


@dataclass(frozen=True)
class Settings:
    """Everything that can be configured; empty `models` serve the embedded `demo`."""

    host: str
    port: int
    tls_certificate: str | None
    tls_key: str | None
    tls_client_ca: str | None
    health_port: int | None
    callers: str | None
    insecure: bool
    metrics_host: str
    metrics_port: int
    models: tuple[ModelSetting, ...]
    device: str
    data_type: str
    max_memory: tuple[MemorySetting, ...]
    offload_dir: str | None
    cache_dir: str | None
    cache_size: int
    index_neurons: bool
    row_cache: int
    threads: int | None
    chunk_bytes: int
    max_waiting: int
    max_request_seconds: float
    max_request_memory: int
    max_request_stream: int
    stall_seconds: float
    grace_seconds: float
    max_connection_age_seconds: float | None
    log_level: str
    log_format: str
    log_prompts: bool


class _ModelType(click.ParamType[ModelSetting]):
    name = "NAME=PATH_OR_HUB_ID[@REVISION]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> ModelSetting:
        """Split the text; a location that is spelled as a path must exist."""
        if isinstance(value, ModelSetting):
            return value
        name, separator, rest = str(value).partition("=")
        location, _, revision = rest.partition("@")
        if not (name and separator and location):
            self.fail(f"expected {self.name}, got {value!r}", param, ctx)
        if location.startswith((".", "/", "~")):  # spelled as a path, not as a hub id
            folder = Path(location).expanduser()
            if not (folder / "config.json").is_file():
                self.fail(f"expected a model folder with config.json, got {location!r}", param, ctx)
            location = str(folder)
        return ModelSetting(name, location, revision or None)


class _SizeType(click.ParamType[int]):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """In bytes; 1 GiB is 2**30 bytes, 1 GB is 10**9."""
        found = SIZE.fullmatch(str(value))
        if found is None:
            self.fail(f"expected {self.name} such as 10GiB, got {value!r}", param, ctx)
        number, unit = found.group(1), found.group(2) or ""
        step = 1024 if unit.endswith("i") else 1000
        return int(float(number) * step ** " KMGT".find(unit[:1] or " "))


class _MemoryType(click.ParamType[MemorySetting]):
    name = "DEVICE=SIZE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> MemorySetting:
        """Split the text."""
        if isinstance(value, MemorySetting):
            return value
        device, _, text = str(value).partition("=")
        if not device or SIZE.fullmatch(text) is None:
            self.fail(f"expected {self.name} such as cuda:0=60GiB, got {value!r}", param, ctx)
        return MemorySetting(device, _SizeType().convert(text, param, ctx))


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


def _option(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, **attributes)


PORT = click.IntRange(0, 65535)
FILE = click.Path(exists=True, dir_okay=False)

OPTIONS: tuple[click.Parameter, ...] = (
    _option("--host", default="127.0.0.1", help="Address to serve on."),
    _option("--port", type=PORT, default=50051, help="gRPC port; 0 picks a free one."),
    _option(
        "--tls-certificate",
        type=FILE,
        default=None,
        help="PEM file: the server's certificate and its chain. Read again on change.",
    ),
    _option("--tls-key", type=FILE, default=None, help="PEM file: the certificate's private key."),
    _option(
        "--tls-client-ca",
        type=FILE,
        default=None,
        help="PEM file: callers must show a certificate that one of these has signed.",
    ),
    _option(
        "--health-port",
        type=PORT,
        default=None,
        help="Answer health alone, in plaintext, on this port too; 0 picks a free one.",
    ),
    _option(
        "--callers",
        type=FILE,
        default=None,
        help="YAML file of callers, their tokens' hashes, scopes and quotas. Read again on change.",
    ),
    _option(
        "--insecure",
        is_flag=True,
        default=False,
        help="Serve beyond loopback without TLS or without authentication.",
    ),
    _option("--metrics-host", default="127.0.0.1", help="Address of the metrics page."),
    _option("--metrics-port", type=PORT, default=9464, help="Prometheus port; 0: free one."),
    _option(
        "--model",
        "models",
        type=_ModelType(),
        multiple=True,
        help="A model to serve; repeat for several. Replaces the embedded demo.",
    ),
    _option(
        "--device",
        default="cpu",
        help="Where models live, as torch names it; auto: split over GPUs, CPU and disk.",
    ),
    _option(
        "--data-type",
        type=click.Choice(DATA_TYPES),
        default="auto",
        help="auto: the checkpoint's own type, float32 on a CPU.",
    ),
    _option(
        "--max-memory",
        type=_MemoryType(),
        multiple=True,
        help="What a model may take of a device, instead of what is free; repeat for several.",
    ),
    _option(
        "--offload-dir",
        type=click.Path(file_okay=False),
        default=None,
        help="With --device auto: where weights stay that fit into no memory.",
    ),
    _option(
        "--cache-dir",
        type=click.Path(file_okay=False),
        default=None,
        help="Where the next server finds what is computed once per model.",
    ),
    _option(
        "--cache-size",
        type=_SizeType(),
        default="10GiB",
        help="What may lie there; what was used longest ago is removed.",
    ),
    _option(
        "--index-neurons",
        is_flag=True,
        default=False,
        help="Read what all neurons write when a model is loaded, not when it is first asked for.",
    ),
    _option(
        "--row-cache",
        type=_SizeType(),
        default="512MiB",
        help="Logits of weight rows kept for later traces, of each model on a CPU; 0: none.",
    ),
    _option(
        "--threads",
        type=click.IntRange(min=1),
        default=None,
        help="Cores that compute one request; torch's own choice is all of them.",
    ),
    _option(
        "--chunk-bytes",
        type=_SizeType(),
        default="64MiB",
        help="Logits that are held at once, whatever a request asks for.",
    ),
    _option(
        "--max-waiting",
        type=click.IntRange(min=1),
        default=64,
        help="Requests that may wait for the device before further ones are refused.",
    ),
    _option(
        "--max-request-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=600.0,
        help="Seconds of the device that one request may be estimated at.",
    ),
    _option(
        "--max-request-memory",
        type=_SizeType(),
        default="16GiB",
        help="Bytes on the device, beside the weights, that one request may be estimated at.",
    ),
    _option(
        "--max-request-stream",
        type=_SizeType(),
        default="2GiB",
        help="Bytes of answer that one request may be estimated at.",
    ),
    _option(
        "--stall-seconds",
        type=click.FloatRange(min=0.1),
        default=60.0,
        help="A stream whose reader takes nothing for this long is aborted.",
    ),
    _option(
        "--grace-seconds",
        type=click.FloatRange(min=0),
        default=30.0,
        help="On SIGTERM, how long running requests may take to finish.",
    ),
    _option(
        "--max-connection-age-seconds",
        type=click.FloatRange(min=1),
        default=None,
        help="After which a connection takes no further calls, so that its client looks again "
        "for servers; streams on it come to their end.",
    ),
    _option("--log-level", type=click.Choice(LOG_LEVELS), default="info"),
    _option(
        "--log-format",
        type=click.Choice(FORMATS),
        default="text",
        help="Lines for people, or one JSON object a line.",
    ),
    _option(
        "--log-prompts",
        is_flag=True,
        default=False,
        help="Put every request's prompt into the log.",
    ),
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


def _settings_command() -> click.Command:
    return click.Command(
        "januslens-server",
        params=list(OPTIONS),
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
    _check_exposure(settings)
    if print_config:
        click.echo(as_yaml(settings), nl=False)
        raise SystemExit(0)
    return settings


def _check_exposure(settings: Settings) -> None:
    """Refuse half a TLS configuration, and to be open to the network by accident."""
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise click.UsageError("expected --tls-certificate and --tls-key together, got one of them")
    encrypted = settings.tls_certificate is not None
    if settings.tls_client_ca is not None and not encrypted:
        raise click.UsageError("expected --tls-certificate with --tls-client-ca, got none")
    known = settings.callers is not None or settings.tls_client_ca is not None
    if settings.insecure or (encrypted and known) or _is_loopback(settings.host):
        return
    missing = " and ".join(
        what
        for what, given in (
            ("--tls-certificate", encrypted),
            ("--callers or --tls-client-ca", known),
        )
        if not given
    )
    raise click.UsageError(
        f"expected {missing} to serve beyond loopback on {settings.host}; "
        "--insecure serves whoever reaches the port"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False


def as_yaml(settings: Settings) -> str:
    """The settings as `--config` reads them."""
    shown = asdict(settings) | {
        "models": [str(model) for model in settings.models],
        "max_memory": [str(memory) for memory in settings.max_memory],
    }
    return yaml.safe_dump(shown, sort_keys=False)


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from `arguments` (default: the command line), environment and file.

    Ends the process: after `--help` or `--print-config` with 0; with 2 and one readable line on
    standard error for a setting that cannot be used.
    """
    command = _settings_command()
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

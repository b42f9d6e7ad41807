"""Every server setting, declared once: name, type, default, help text and rules between settings.

Flags (`--max-waiting`), environment variables (`JANUSLENS_MAX_WAITING`) and keys of the settings
file (`max_waiting`) follow from the names.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FilePath,
    PlainSerializer,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENVIRONMENT_PREFIX = "JANUSLENS_"

# Between the name of a model and the LoRA folder that changes it.
LORA = "+lora="

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]i?)?B?")
_HUB_ID = re.compile(r"[\w.-]+/(\*|[\w.-]+)", re.ASCII)
_DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?")


@dataclass(frozen=True)
class ModelLocation:
    """A model to serve, written `NAME=PATH_OR_HUB_ID[@REVISION]` or `NAME=MODEL+lora=FOLDER`.

    `lora` is a LoRA folder; `location` is then the name of the model that it changes.
    """

    name: str
    location: str
    revision: str | None
    lora: Path | None = None

    def __str__(self) -> str:
        suffix = f"@{self.revision}" if self.revision else ""
        suffix += f"{LORA}{self.lora}" if self.lora else ""
        return f"{self.name}={self.location}{suffix}"


@dataclass(frozen=True)
class Load:
    """A change of a running server's models: add this one."""

    location: ModelLocation


@dataclass(frozen=True)
class Unload:
    """A change of a running server's models: remove the one of this name."""

    name: str


Change = Load | Unload


def name_of(change: Change) -> str:
    """Return the name of the model that a change is about."""
    return change.location.name if isinstance(change, Load) else change.name


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that one model may use of a device, written `DEVICE=SIZE`."""

    device: str
    size: int

    def __str__(self) -> str:
        return f"{self.device}={self.size}"


def _to_bytes(value: Any) -> int:
    """Convert `10GiB` (2**30 bytes each) or `10GB` (10**9 bytes each) to bytes."""
    found = _SIZE.fullmatch(str(value))
    if found is None:
        raise ValueError("expected a size such as 10GiB")
    number, unit = found.group(1), found.group(2) or ""
    step = 1024 if unit.endswith("i") else 1000
    return int(float(number) * step ** " KMGT".find(unit[:1] or " "))


def _to_model(value: Any) -> ModelLocation:
    if isinstance(value, ModelLocation):
        return value
    name, _, rest = str(value).partition("=")
    base, lora, folder = rest.partition(LORA)
    if isinstance(value, str) and name and base and folder:
        return ModelLocation(name, base, None, Path(folder).expanduser())
    location, _, revision = rest.partition("@")
    if lora or not (isinstance(value, str) and name and location):
        raise ValueError("expected NAME=PATH_OR_HUB_ID[@REVISION] or NAME=MODEL+lora=FOLDER")
    return ModelLocation(name, location, revision or None)


def _to_memory_limit(value: Any) -> MemoryLimit:
    if isinstance(value, MemoryLimit):
        return value
    device, _, text = str(value).partition("=")
    if not _DEVICE.fullmatch(device) or not _SIZE.fullmatch(text):
        raise ValueError("expected DEVICE=SIZE such as cuda:0=60GiB")
    return MemoryLimit(device, _to_bytes(text))


def _all_addresses(host: str) -> str:
    """Return `0.0.0.0` for `[::]` on a machine without IPv6.

    A socket on `[::]` accepts IPv4 too, so one setting serves machines and clusters of any kind.
    """
    return "0.0.0.0" if host.strip("[]") == "::" and not has_ipv6() else host  # noqa: S104


def has_ipv6() -> bool:
    """Whether this machine can open IPv6 sockets."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def _check_device(device: str) -> str:
    if device != "auto" and not _DEVICE.fullmatch(device):
        raise ValueError("expected cpu, cuda, cuda:N or auto")
    return device


def _check_loadable(entry: str) -> str:
    """Return an absolute path for a folder, which must exist, and a hub id unchanged."""
    if not entry.startswith((".", "/", "~")):
        if not _HUB_ID.fullmatch(entry):
            raise ValueError("expected a folder such as /models, or a hub id such as org/name")
        return entry
    folder = Path(entry).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError("expected an existing folder")
    return str(folder)


def _split(value: Any) -> Any:
    """Split the entries of an environment variable, which are separated by spaces."""
    return value.split() if isinstance(value, str) else value


Host = Annotated[str, AfterValidator(_all_addresses)]
Port = Annotated[int, Field(ge=0, le=65535)]
Size = Annotated[int, BeforeValidator(_to_bytes)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
Device = Annotated[str, AfterValidator(_check_device)]
Model = Annotated[ModelLocation, BeforeValidator(_to_model), PlainSerializer(str)]
Limit = Annotated[MemoryLimit, BeforeValidator(_to_memory_limit), PlainSerializer(str)]
Loadables = Annotated[
    tuple[Annotated[str, AfterValidator(_check_loadable)], ...], NoDecode, BeforeValidator(_split)
]
Models = Annotated[tuple[Model, ...], NoDecode, BeforeValidator(_split)]
Limits = Annotated[tuple[Limit, ...], NoDecode, BeforeValidator(_split)]


def _setting(default: Any, help_text: str, metavar: str | None = None, **rules: Any) -> Any:
    """Declare a setting: default, help text, placeholder in `--help`, and pydantic's rules."""
    return Field(default, description=help_text, json_schema_extra={"metavar": metavar}, **rules)


class ServerSettings(BaseSettings):
    """Validated settings of one server. Without `models` it serves the embedded model `demo`."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    # Network and access
    host: Host = _setting(
        "127.0.0.1", "Address to serve on; [::] for all addresses, IPv6 and IPv4.", "TEXT"
    )
    port: Port = _setting(50051, "gRPC port; 0 picks a free one.", "INTEGER")
    tls_certificate: FilePath | None = _setting(
        None, "Server certificate and its chain (PEM); reloaded when the file changes.", "FILE"
    )
    tls_key: FilePath | None = _setting(
        None, "Private key of the server certificate (PEM).", "FILE"
    )
    tls_client_ca: FilePath | None = _setting(
        None, "Certificate authorities (PEM) for client certificates (mutual TLS).", "FILE"
    )
    health_port: Port | None = _setting(
        None, "Open an extra plaintext port that serves only health checks.", "INTEGER"
    )
    callers: FilePath | None = _setting(
        None,
        "YAML file of callers with token hashes, scopes and quotas; reloaded when it changes.",
        "FILE",
    )
    insecure: bool = _setting(False, "Allow serving beyond loopback without TLS or authentication.")
    metrics_host: Host = _setting("127.0.0.1", "Address of the Prometheus metrics page.", "TEXT")
    metrics_port: Port = _setting(9464, "Port of the metrics page; 0 picks a free one.", "INTEGER")

    # Models and the device
    models: Models = _setting(
        (),
        "Model to serve (repeatable); replaces the embedded demo model.",
        "NAME=PATH_OR_HUB_ID[@REVISION] or NAME=MODEL+lora=FOLDER",
    )
    loadable: Loadables = _setting(
        (),
        "Folder, or hub id such as org/name or org/*, whose models may be loaded at run time "
        "(repeatable).",
        "FOLDER_OR_HUB_ID",
    )
    device: Device = _setting(
        "cpu",
        "Device for models: cpu, cuda, cuda:N, or auto to split over GPUs, CPU and disk.",
        "TEXT",
    )
    data_type: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "Data type of weights; auto = float32 on a CPU, otherwise the checkpoint's own."
    )
    max_memory: Limits = _setting(
        (),
        "Maximum memory of one model on a device (repeatable); default: the free memory.",
        "DEVICE=SIZE",
    )
    offload_dir: Folder | None = _setting(
        None, "With --device auto: folder for weights that do not fit in memory.", "DIRECTORY"
    )
    cache_dir: Folder | None = _setting(
        None,
        "Folder for results that are computed once per model and reused after a restart.",
        "DIRECTORY",
    )
    cache_size: Size = _setting(
        "10GiB", "Maximum size of --cache-dir; least recently used entries are evicted.", "SIZE"
    )
    load_stall_seconds: float = _setting(
        600.0,
        "Report januslens.live as NOT_SERVING if loading makes no progress for this long.",
        "SECONDS",
        gt=0,
    )
    index_neurons: bool = _setting(
        False, "Build the neuron index when a model loads, not at the first FindNeurons request."
    )
    row_cache: Size = _setting(
        "512MiB",
        "Memory per model for cached logits of weight rows (CPU only); 0 disables the cache.",
        "SIZE",
    )
    processes: int = _setting(
        1,
        "Number of server processes on the port; each loads all models and has its own queue.",
        "INTEGER",
        ge=1,
    )
    threads: int | None = _setting(
        None,
        "CPU threads per process for one request; default: all cores, divided by --processes.",
        "INTEGER",
        ge=1,
    )
    chunk_bytes: Size = _setting(
        "64MiB", "Maximum memory for the logits that a request computes at once.", "SIZE"
    )

    # Requests
    max_waiting: int = _setting(
        64, "Maximum requests waiting for the device; further ones are refused.", "INTEGER", ge=1
    )
    max_request_seconds: float = _setting(
        600.0, "Maximum estimated device time of a request.", "SECONDS", gt=0
    )
    max_request_memory: Size | None = _setting(
        None,
        "Maximum estimated device memory of a request, besides the weights; default: the free "
        "memory minus a reserve.",
        "SIZE",
    )
    max_request_stream: Size = _setting(
        "2GiB", "Maximum estimated size of a response, over all its messages.", "SIZE"
    )
    stall_seconds: float = _setting(
        60.0, "Abort a stream if the client reads nothing for this long.", "SECONDS", ge=0.1
    )
    max_unread: Size = _setting(
        "1GiB",
        "Maximum size of results that callers have not read; above it, the slowest streams end.",
        "SIZE",
    )
    grace_seconds: float = _setting(
        30.0, "Time that running requests get to finish after SIGTERM.", "SECONDS", ge=0
    )
    stop_with_input: bool = _setting(
        False, "Stop when standard input ends, as it does when the process at its other end ends."
    )
    max_connection_age_seconds: float | None = _setting(
        None,
        "Close a connection of this age when its running calls end; the client reconnects.",
        "SECONDS",
        ge=1,
    )

    max_connections: int = _setting(
        1000, "Maximum open connections; further ones are closed at once.", "INTEGER", ge=1
    )
    max_streams: int = _setting(
        256, "Maximum open calls of one connection; clients delay further ones.", "INTEGER", ge=1
    )
    max_watches: int = _setting(
        1000, "Maximum open health watches; one address may open half of them.", "INTEGER", ge=1
    )

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Least severe level to log."
    )
    log_format: Literal["text", "json"] = _setting(
        "text", "Log lines as text, or as one JSON object per line."
    )
    log_prompts: bool = _setting(False, "Log the prompt of every request.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not a source of ours
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags, then the environment, then the file, whose content `from_file` passes."""
        flags = init_settings()
        content = flags.pop("from_file", {})
        return (
            InitSettingsSource(settings_cls, flags),
            env_settings,
            InitSettingsSource(settings_cls, content),
        )

    @model_validator(mode="after")
    def _check_model_names(self) -> Self:
        names = [model.name for model in self.models]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"model name {twice[0]!r} is used twice; give each model its own name")
        bases = {model.name for model in self.models if model.lora is None}
        for model in self.models:
            if model.lora is not None and model.location not in bases:
                raise ValueError(
                    f"model {model.name!r} changes {model.location!r}, which is not configured; "
                    f"add --model {model.location}=PATH_OR_HUB_ID"
                )
        return self

    @model_validator(mode="after")
    def _check_exposure(self) -> Self:
        """Refuse an incomplete TLS configuration, and an accidentally open server."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key must be given together")
        encrypted = self.tls_certificate is not None
        if self.tls_client_ca is not None and not encrypted:
            raise ValueError("--tls-client-ca requires --tls-certificate and --tls-key")
        authenticated = self.callers is not None or self.tls_client_ca is not None
        if self.loadable and self.callers is None and not _is_loopback(self.host):
            raise ValueError(
                "--loadable requires --callers when serving beyond loopback: only callers with "
                "'admin: true' may then load models"
            )
        if self.insecure or (encrypted and authenticated) or _is_loopback(self.host):
            return self
        missing = []
        if not encrypted:
            missing.append("--tls-certificate and --tls-key")
        if not authenticated:
            missing.append("--callers or --tls-client-ca")
        raise ValueError(
            f"serving beyond loopback on {self.host!r} requires {', and '.join(missing)}; "
            "to serve without them, pass --insecure"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may resolve to any address
        return False


def as_yaml(settings: ServerSettings) -> str:
    """Return the settings in the format of the file for `--config`."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)

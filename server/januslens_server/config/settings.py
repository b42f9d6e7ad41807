"""What can be configured, read and ready to use."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import yaml


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
    processes: int
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


def as_yaml(settings: Settings) -> str:
    """The settings as `--config` reads them."""
    shown = asdict(settings) | {
        "models": [str(model) for model in settings.models],
        "max_memory": [str(memory) for memory in settings.max_memory],
    }
    return yaml.safe_dump(shown, sort_keys=False)

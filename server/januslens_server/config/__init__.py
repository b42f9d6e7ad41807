"""Read the server's settings from flags, environment and the settings file.

A setting is taken from its flag, else from `JANUSLENS_<NAME>`, else from the YAML file named by
`--config`, else from its default.
"""

from januslens_server.config.command import read_settings, unknown_variable_warnings
from januslens_server.config.settings import (
    ENVIRONMENT_PREFIX,
    Change,
    Load,
    MemoryLimit,
    ModelLocation,
    ServerSettings,
    Unload,
    as_yaml,
    name_of,
)

__all__ = [
    "ENVIRONMENT_PREFIX",
    "Change",
    "Load",
    "MemoryLimit",
    "ModelLocation",
    "ServerSettings",
    "Unload",
    "as_yaml",
    "name_of",
    "read_settings",
    "unknown_variable_warnings",
]

"""The only reader of flags, environment and configuration files.

A setting comes from its flag, else from `JANUSLENS_<NAME>`, else from the YAML file named by
`--config`, else from its default.
"""

from januslens_server.config.command import ENVIRONMENT_PREFIX, read_settings, settings_command
from januslens_server.config.settings import MemorySetting, ModelSetting, Settings, as_yaml

__all__ = [
    "ENVIRONMENT_PREFIX",
    "MemorySetting",
    "ModelSetting",
    "Settings",
    "as_yaml",
    "read_settings",
    "settings_command",
]

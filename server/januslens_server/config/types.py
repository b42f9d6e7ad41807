"""How the text of a setting is read, beyond what click knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from januslens_server.config.settings import MemorySetting, ModelSetting

SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]i?)?B?")


class ModelType(click.ParamType[ModelSetting]):
    """A model's name and where it is."""

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


class SizeType(click.ParamType[int]):
    """Bytes, or a number with a unit."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """In bytes; 1 GiB is 2**30 bytes, 1 GB is 10**9."""
        found = SIZE.fullmatch(str(value))
        if found is None:
            self.fail(f"expected {self.name} such as 10GiB, got {value!r}", param, ctx)
        number, unit = found.group(1), found.group(2) or ""
        step = 1024 if unit.endswith("i") else 1000
        return int(float(number) * step ** " KMGT".find(unit[:1] or " "))


class MemoryType(click.ParamType[MemorySetting]):
    """A device and how much of it."""

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
        return MemorySetting(device, SizeType().convert(text, param, ctx))


PORT = click.IntRange(0, 65535)
FILE = click.Path(exists=True, dir_okay=False)


def option(*names: str, **attributes: Any) -> click.Option:
    """One setting, named by its flag."""
    return click.Option(names, **attributes)

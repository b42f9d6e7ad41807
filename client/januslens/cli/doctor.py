"""The command `januslens doctor`: check the installation, its devices, and models."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from importlib import metadata

import click
from rich.console import Console

from januslens.cli.lookups import models_table
from januslens.cli.tables import console
from januslens.errors import LaunchError
from januslens.launching import launch

# In its own process, since the command does not import torch.
_DEVICES = """
import json, os
import torch
devices = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
for kind in ("cuda", "xpu"):
    module = getattr(torch, kind)
    for i in range(module.device_count() if module.is_available() else 0):
        properties = module.get_device_properties(i)
        memory = properties.total_memory / 2**30
        devices.append(f"{kind}:{i}: {properties.name}, {memory:.1f} GiB")
if torch.backends.mps.is_available():
    devices.append("mps")
print(json.dumps(devices))
"""
_DEVICE_SECONDS = 120
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^\]]*\])?[^;]*(?:;.*\bextra == [\"']([\w-]+)[\"'])?")
# What each extra is for. A machine that only sends requests does without most of them.
_EXTRAS = {
    "server": "serve models on this machine",
    "cli": "run the command januslens",
    "ui": "run januslens ui",
    "analysis": "get frames and graphs, and run surveys",
    "figures": "draw figures",
    "otel": "export a server's spans",
}


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--device", default=None, help="Load the models on this device, such as cuda.")
@click.option("--timeout", default=600.0, show_default=True, help="Maximum seconds per model.")
def doctor(models: tuple[str, ...], device: str | None, timeout: float) -> int:
    """Check this installation, its devices, and whether models can be served.

    MODEL is a folder, a GGUF file, a hub id, HUB_ID@REVISION, or NAME= and one of these. Each one
    is loaded and checked by a server that ends afterwards. The exit status is 1 if something is
    wrong.
    """
    out = console()
    out.print(
        f"januslens {metadata.version('januslens')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    missing = _show_extras(out)
    wrong = bool(missing["server"] and models)
    if not missing["server"]:
        wrong |= not _show_devices(out)
        for model in models:
            wrong |= not _show_model(out, model, device, timeout)
    elif models:
        out.print("models are not checked: the extra server is not installed")
    return int(wrong)


def _show_extras(out: Console) -> dict[str, list[str]]:
    """Print each extra and what it lacks; return the missing libraries by extra."""
    missing: dict[str, list[str]] = {extra: [] for extra in _EXTRAS}
    for requirement in metadata.requires("januslens") or ():
        if (found := _REQUIREMENT.match(requirement)) and found[2] in missing:
            try:
                metadata.version(found[1])
            except metadata.PackageNotFoundError:
                missing[found[2]].append(found[1])
    for extra, names in missing.items():
        if names:
            advice = f"to {_EXTRAS[extra]}, run pip install 'januslens[{extra}]'"
            lacking = f"not installed: {advice} (missing {', '.join(names)})"
            out.print(f"  extra {extra}: {lacking}", markup=False, soft_wrap=True)
        else:
            out.print(f"  extra {extra}: installed", markup=False)
    return missing


def _show_devices(out: Console) -> bool:
    """Print the devices that torch finds; return whether torch works."""
    names = ("torch", "transformers")
    out.print(", ".join(f"{name} {metadata.version(name)}" for name in names))
    found = subprocess.run(  # noqa: S603 - this interpreter, without a shell
        [sys.executable, "-c", _DEVICES],
        check=False,
        capture_output=True,
        text=True,
        timeout=_DEVICE_SECONDS,
    )
    if found.returncode != 0:
        reason = found.stderr.strip().splitlines()[-1:] or [f"status {found.returncode}"]
        out.print(f"  torch does not work: {reason[0]}", markup=False, style="red")
        return False
    for device in json.loads(found.stdout):
        out.print(f"  {device}", markup=False)
    return True


def _show_model(out: Console, model: str, device: str | None, timeout: float) -> bool:
    """Load a model and print its row of `januslens models`, or why it cannot be served."""
    settings = {} if device is None else {"device": device}
    try:
        with launch(model, timeout=timeout, progress=None, **settings) as client:
            out.print(models_table(client.list_models()))
    except LaunchError as error:
        out.print(str(error), markup=False, style="red", soft_wrap=True)
        return False
    return True

"""Run a process with a container's restrictions: read-only files and no privileges.

This needs Linux and root, which CI has; elsewhere processes run without restrictions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

# Use a separate mount namespace, read-only except for one new folder; then drop all privileges.
_SCRIPT = """
set -e
scratch=$1; shift
mount -t tmpfs -o size=256m tmpfs "$scratch"
mount -o remount,bind,ro /
exec setpriv --bounding-set=-all --inh-caps=-all --ambient-caps=-all --no-new-privs "$@"
"""


def confined(scratch: Path) -> list[str]:
    """Return the prefix of a confined command; empty if this machine cannot confine it."""
    scratch.mkdir(exist_ok=True)
    return _command(scratch) if can_confine(scratch) else []


@cache
def can_confine(scratch: Path) -> bool:
    """Whether a confined process can write to `scratch` and nowhere else."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    elsewhere = scratch.parent / "elsewhere"
    probe = f'touch "{scratch}/here" && ! touch "{elsewhere}" 2>/dev/null'
    done = subprocess.run(
        [*_command(scratch), "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and not elsewhere.exists()


def _command(scratch: Path) -> list[str]:
    return [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        _SCRIPT,
        "sh",
        str(scratch),
    ]

"""The `januslens` command."""

from __future__ import annotations

import importlib
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command, or print how to install its libraries if they are missing."""
    try:
        program = importlib.import_module("januslens.cli.program")
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("click", "rich"):
            raise
        sys.exit(f"the command needs {library}: pip install 'januslens[cli]'")
    program.januslens()

"""Libraries that only some calls need, imported when the first of those calls is made."""

from __future__ import annotations

import importlib
from typing import Any


def require(library: str, extra: str, purpose: str) -> Any:
    """Import `library`, or say which extra of this distribution brings it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library.partition(".")[0]:
            raise  # the library is there, but broken
        message = f"{purpose} needs {library}: pip install 'januslens[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error

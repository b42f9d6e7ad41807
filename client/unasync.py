"""Generate the synchronous client, `januslens/client.py`, from the asynchronous `januslens/aio.py`.

python client/unasync.py            # write client.py
python client/unasync.py --check    # fail if client.py differs
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "januslens"
SOURCE, TARGET = PACKAGE / "aio.py", PACKAGE / "client.py"

# Regular expressions, matched as whole words, and their replacements. Texts are replaced, too.
SUBSTITUTIONS = (
    (
        "The asynchronous client. The synchronous one, `client.py`, is generated from this module.",
        "The synchronous client. Generated from `aio.py` by client/unasync.py; do not edit.",
    ),
    ("An asynchronous client", "A synchronous client"),
    ("Event loops may share it; it has a connection for each", "Threads may share it"),
    ("Async(Channel|Client|EventStream|Generation)", r"\1"),
    ("StopAsyncIteration", "StopIteration"),
    ("__a(enter|exit|iter|next)__", r"__\1__"),
    ("anext", "next"),
    ("async (def|for|with)", r"\1"),
)


def synchronous(source: str) -> str:
    """Return the synchronous form of an asynchronous module, formatted."""
    for pattern, replacement in SUBSTITUTIONS:
        source = re.sub(rf"(?<!\w){pattern}(?!\w)", replacement, source)
    source = re.sub(r"(?<!\w)await ", "", source)
    ruff = [sys.executable, "-m", "ruff"]
    for options in (("check", "--quiet", "--select=I", "--fix"), ("format", "--quiet")):
        command = [*ruff, *options, f"--stdin-filename={TARGET}", "-"]
        done = subprocess.run(command, input=source, text=True, check=True, capture_output=True)
        source = done.stdout
    return source


def main() -> None:
    """Write the synchronous client, or check that it is up to date."""
    generated = synchronous(SOURCE.read_text(encoding="utf-8"))
    if "--check" not in sys.argv:
        TARGET.write_text(generated, encoding="utf-8")
    elif generated != TARGET.read_text(encoding="utf-8"):
        sys.exit(f"{TARGET} differs from {SOURCE}: run 'make client' and commit the result")


if __name__ == "__main__":
    main()

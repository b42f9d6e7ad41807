"""Write the manifests of every installation to a folder: `python -m tests.deploy.render FOLDER`.

The base is left out, because an overlay sets its namespace.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from tests.deploy.manifests import INSTALLATIONS


def main() -> None:
    """Write one file for each installation."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in INSTALLATIONS.items():
        if name != "base":
            text = yaml.safe_dump_all(make().resources)
            (folder / f"{name.replace(' ', '-')}.yaml").write_text(text)


if __name__ == "__main__":
    main()

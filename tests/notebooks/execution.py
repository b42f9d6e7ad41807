"""Execute the example notebooks against a server; `make notebook` saves their outputs.

`python -m tests.notebooks.execution` starts a server with the embedded model, executes all
notebooks or those that are named, and saves them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.support.server import running_server

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = tuple(sorted(file.stem for file in FOLDER.glob("*.ipynb")))
SECONDS = 120
# Outputs of cells with this tag are not saved, because they would make the file large.
UNSAVED = "unsaved"


def saved(name: str) -> NotebookNode:
    """Return a notebook in the repository."""
    notebook: NotebookNode = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    return notebook


def executed(name: str, address: str) -> NotebookNode:
    """A notebook after every cell has run against a server.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook = saved(name)
    # A separate folder for the sockets and for IPython, so that no start-up files of the user run.
    with (
        TemporaryDirectory() as folder,
        patch.dict(os.environ, {"JANUSLENS_SERVER": address, "IPYTHONDIR": folder}),
    ):
        client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3")
        kernel = client.create_kernel_manager()
        kernel.transport, kernel.ip = "ipc", str(Path(folder) / "kernel")
        return client.execute(cwd=folder)


def tidied(notebook: NotebookNode) -> NotebookNode:
    """Remove outputs that differ between runs, or that would make the file large."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [] if UNSAVED in cell.metadata.get("tags", ()) else cell.outputs
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data.pop("text/plain", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    """Execute and save the notebooks."""
    with running_server() as server:
        for name in sys.argv[1:] or NOTEBOOKS:
            nbformat.write(tidied(executed(name, server.address)), FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()

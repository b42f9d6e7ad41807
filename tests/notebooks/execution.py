"""Execute the example notebook against a server; `make notebook` saves its outputs.

`python -m tests.notebooks.execution` starts a server with the embedded model, executes the notebook
and saves it.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.support.server import running_server

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "tour.ipynb"
SECONDS = 120
# Outputs of cells with this tag are not saved, because they would make the file large.
UNSAVED = "unsaved"


def saved() -> NotebookNode:
    """Return the notebook in the repository."""
    notebook: NotebookNode = nbformat.read(NOTEBOOK, as_version=4)
    return notebook


def executed(address: str) -> NotebookNode:
    """The notebook after every cell has run against a server.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook = saved()
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
    """Execute and save the notebook."""
    with running_server() as server:
        nbformat.write(tidied(executed(server.address)), NOTEBOOK)


if __name__ == "__main__":
    main()

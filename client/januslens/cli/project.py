"""`januslens project`: vectors of one's own in a model's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from januslens._client import Client
from januslens._extras import require
from januslens._results.projection import Projection
from januslens.cli.parameters import COUNT, LENS
from januslens.cli.session import model_option, usage_errors, with_client
from januslens.cli.show.cells import rank_cell, tokens_cell
from januslens.cli.show.console import console, table


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Which tensor of a safetensors file; default: the only one.")
@click.option("--target", help="Token to report the rank of; a leading space counts.")
@click.option("--lens", type=LENS, default="final_norm", show_default=True)
@click.option("--top-k", type=COUNT, help="How many of the most likely tokens.")
@click.option("--bottom-k", type=COUNT, help="How many of the least likely tokens.")
@model_option
@with_client
def project(
    client: Client, as_json: bool, /, *, file: Path, name: str | None, **asked: Any
) -> None:
    """Read the vectors of FILE (.npy or .safetensors, [d_model] or [n, d_model])."""
    with usage_errors():  # the other options are named as the verb's arguments
        found = client.project(read_vectors(file, name), **asked)
    if not as_json:
        console().print(_table(found))


def read_vectors(file: Path, name: str | None) -> NDArray[np.generic]:
    """The array of a .npy file, or one tensor of a .safetensors file.

    Raises:
        ValueError: It is neither, or which tensor is meant is not clear.
    """
    if file.suffix == ".npy":
        array: NDArray[np.generic] = np.load(file, allow_pickle=False)
        return array
    if file.suffix != ".safetensors":
        raise ValueError(f"expected a .npy or .safetensors file; got {file.name}")
    safetensors = require("safetensors.numpy", "analysis", "reading safetensors")
    tensors: dict[str, NDArray[np.generic]] = safetensors.load_file(file)
    wanted = next(iter(tensors)) if name is None and len(tensors) == 1 else name
    if wanted not in tensors:
        raise ValueError(f"expected --name to be one of {', '.join(sorted(tensors))}; got {name}")
    return tensors[wanted]


def _table(projections: list[Projection]) -> Table:
    grid = table(">row", "top", "bottom", ">entropy, bits", ">target's rank")
    for row, read in enumerate(projections):
        grid.add_row(
            str(row),
            tokens_cell(read.top_tokens),
            tokens_cell(read.bottom_tokens),
            Text(f"{read.entropy_bits:.2f}"),
            rank_cell(read.target_rank),
        )
    return grid

"""A finished or interrupted survey: its manifest, and its tables as datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from januslens.results.exports import require

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow.dataset as ds

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SurveyProgress:
    """How far a survey has come.

    Attributes:
        total: Number of prompts.
        done: Number of prompts with a result.
        failed: Number of prompts that failed.
        per_second: Prompts per second since the survey was started or resumed.
        seconds_left: Expected seconds until the end; None before the first prompt.
        retries: Calls that were repeated because a server was lost or busy.
    """

    total: int
    done: int
    failed: int
    per_second: float
    seconds_left: float | None
    retries: int


@dataclass(frozen=True)
class Survey:
    """The folder of a survey.

    Attributes:
        path: The folder.
        manifest: What is needed to repeat the survey: model, revision, request, input, versions.
    """

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Survey:
        """Open the folder of a survey, which may be unfinished.

        Raises:
            FileNotFoundError: The folder has no manifest.
        """
        text = (Path(path) / MANIFEST).read_text(encoding="utf-8")
        return cls(Path(path), json.loads(text))

    @property
    def complete(self) -> bool:
        """Whether every prompt has a result or is listed in the table `failures`."""
        return bool(self.manifest["status"] == "complete")

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of the tables that have rows."""
        return tuple(sorted({file.parent.name for file in self.path.glob("*/*.parquet")}))

    def dataset(self, table: str) -> ds.Dataset:
        """Return a table as a pyarrow dataset, which is read when needed. Requires pyarrow.

        Raises:
            KeyError: The survey has no such table.
        """
        datasets = require("pyarrow.dataset", "analysis", "reading a survey")
        files = sorted(str(file) for file in (self.path / table).glob("*.parquet"))
        if not files:
            raise KeyError(f"no table {table!r}; expected one of {', '.join(self.tables)}")
        found: ds.Dataset = datasets.dataset(files, format="parquet")
        return found

    def to_pandas(self, table: str) -> pd.DataFrame:
        """Return a whole table as a data frame. Requires pyarrow and pandas.

        Raises:
            KeyError: The survey has no such table.
        """
        frame: pd.DataFrame = self.dataset(table).to_table().to_pandas()
        return frame

"""The folder of a survey: parts that are written whole, and what a resumed survey finds of them.

A part has the rows of some prompts, in one file for each table. Every file is written under another
name, flushed to the disk and renamed. The file in `prompts` is the last one of its part: the
prompts listed there are done. Files of a part without it were left by a process that was killed,
and are removed when the survey is resumed. The file in `failures` is a part of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from januslens.errors import JanuslensError
from januslens.results.exports import save_tensors
from januslens.results.models import Model
from januslens.surveys.prompts import (
    Input,
    SurveyPrompt,
    SurveyPrompts,
    SurveyRequest,
    copy_prompts,
)
from januslens.surveys.schema import SCHEMAS
from januslens.surveys.survey import MANIFEST, Survey
from januslens.surveys.tables import Rows, batches_by_table

INPUT, LOCK = "input.jsonl", ".lock"
FORMAT = 1
# What must be the same when a survey is resumed.
_FIXED = ("rpc", "request", "input", "model")
_PROVENANCE = b"januslens.provenance"
_LABELS = {"string": pa.string(), "double": pa.float64(), "bool": pa.bool_()}


class SurveyFolder:
    """Writes the parts of one survey; only one process may have it open."""

    def __init__(self, path: Path, found: Input) -> None:
        self.path = path
        self.input = found
        self._schema = SCHEMAS["prompts"]
        for name, kind in found.labels.items():
            self._schema = self._schema.append(pa.field(f"label_{name}", _LABELS[kind]))

    @classmethod
    @contextmanager
    def opened(
        cls, out: str | Path, prompts: SurveyPrompts, request: SurveyRequest
    ) -> Iterator[Self]:
        """Create or open the folder and lock it; the prompts are checked and copied into it.

        Raises:
            ValueError: A prompt is invalid, or the folder has a survey of other prompts.
            BlockingIOError: Another process writes to the folder.
            FileExistsError: The folder has other files.
        """
        path = Path(out)
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()) and not (path / LOCK).exists():
            raise FileExistsError(
                f"the folder {str(path)!r} has other files; give an empty folder or a new one"
            )
        with (path / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"another process writes to the survey {str(path)!r}; wait for its end"
                raise BlockingIOError(error.errno, message) from None
            yield cls(path, _copied(path, prompts, request))

    def begin(self, request: SurveyRequest, model: Model) -> None:
        """Write the manifest, or compare it with that of the survey to resume.

        Raises:
            ValueError: The survey to resume has another request, input, model or revision.
        """
        asked = {
            "rpc": request.rpc,
            "request": request.to_json(),
            "input": {
                "file": INPUT,
                "sha256": self.input.sha256,
                "prompts": self.input.count,
                "labels": dict(self.input.labels),
            },
            "model": {"name": model.name, "revision": model.provenance.revision},
        }
        if (self.path / MANIFEST).exists():
            begun = Survey.open(self.path).manifest
            different = [name for name in _FIXED if begun[name] != asked[name]]
            if different:
                name = different[0]
                raise ValueError(
                    f"the survey {str(self.path)!r} has another {name}: {_short(begun[name])}, "
                    f"not {_short(asked[name])}; resume it with the same arguments, or give "
                    "another folder"
                )
            self.remove_orphans()
            return
        libraries = ("januslens", "pyarrow", "numpy", "grpcio", "protobuf")
        client = {name: metadata.version(name) for name in libraries}
        self._write_manifest(
            {
                "format": FORMAT,
                "status": "running",
                "started": _now(),
                **asked,
                "sizes": {
                    name: size for name, size in asdict(model).items() if isinstance(size, int)
                },
                "client": client | {"python": platform.python_version()},
            }
        )

    def finish(self) -> Survey:
        """Complete the manifest with the counts and with the provenance of all results."""
        manifest = dict(Survey.open(self.path).manifest)
        provenances: list[Any] = []
        for file in sorted((self.path / "prompts").glob("*.parquet")):
            listed = json.loads(pq.read_schema(file).metadata[_PROVENANCE])
            provenances += [one for one in listed if one not in provenances]
        done, failed = self.done()
        self._write_manifest(
            manifest
            | {
                "status": "complete",
                "finished": _now(),
                "results": sum(done) - failed,
                "failures": failed,
                "provenance": provenances,
            }
        )
        return Survey.open(self.path)

    def done(self) -> tuple[bytearray, int]:
        """Return a flag for each prompt that has been written, and the number of failed ones."""
        done, failed = bytearray(self.input.count), 0
        for table in ("prompts", "failures"):
            for file in (self.path / table).glob("*.parquet"):
                numbers = _numbers(file)
                failed += len(numbers) if table == "failures" else 0
                for number in numbers:
                    done[number] = True
        return done, failed

    def written(self, numbers: Iterable[int]) -> set[int]:
        """Return the prompts in those parts whose first prompt is one of `numbers`."""
        files = (
            self.path / table / f"{_part(number)}.parquet"
            for number in numbers
            for table in ("prompts", "failures")
        )
        return {number for file in files if file.exists() for number in _numbers(file)}

    @property
    def has_results(self) -> bool:
        """Whether a result has been written."""
        return any((self.path / "prompts").glob("*.parquet"))

    def forget_failures(self) -> None:
        """Remove the failures, so that their prompts are sent again."""
        for file in (self.path / "failures").glob("*.parquet"):
            file.unlink()

    def write(self, part: Sequence[tuple[SurveyPrompt, Rows]]) -> None:
        """Write the results of some prompts, which are then done."""
        ordered = sorted(part, key=lambda pair: pair[0].number)
        name = _part(ordered[0][0].number)
        rows = [_with_file(one, f"tensors/{name}.safetensors") for _, one in ordered]
        tensors = {key: tensor for one in rows for key, tensor in one.tensors.items()}
        if tensors:
            target = self.path / "tensors" / f"{name}.safetensors"
            _write(target, lambda path: save_tensors(path, tensors, {}))
        for table, found in batches_by_table(rows):
            self._write_table(table, name, found)
        listed = pa.Table.from_pylist(
            [
                _shown_labels(prompt.row(), self.input.labels)
                | {"prompt": prompt.number, "token_count": one.token_count}
                for prompt, one in ordered
            ],
            schema=self._schema,
        )
        distinct = {repr(one.provenance): one.provenance for one in rows}
        made = json.dumps([asdict(one) for one in distinct.values()])
        self._write_table("prompts", name, listed.replace_schema_metadata({_PROVENANCE: made}))

    def write_failures(self, failures: Sequence[tuple[SurveyPrompt, JanuslensError]]) -> None:
        """Write the failures of some prompts."""
        ordered = sorted(failures, key=lambda pair: pair[0].number)
        listed = [
            {
                "prompt": prompt.number,
                "id": prompt.id,
                "reason": error.reason or error.code,
                "message": error.message,
                "request_id": error.request_id,
            }
            for prompt, error in ordered
        ]
        table = pa.Table.from_pylist(listed, schema=SCHEMAS["failures"])
        self._write_table("failures", _part(ordered[0][0].number), table)

    def _write_table(self, table: str, name: str, rows: pa.Table) -> None:
        _write(
            self.path / table / f"{name}.parquet",
            lambda path: pq.write_table(rows, path, compression="zstd"),
        )

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        _write(self.path / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))

    def remove_orphans(self) -> None:
        """Remove the files that a killed process left: unfinished ones, and those of its part."""
        whole = {file.stem for file in (self.path / "prompts").glob("*.parquet")}
        for file in self.path.glob("*/*"):
            table = file.parent.name
            orphan = table != "failures" and file.stem not in whole
            if file.name.startswith(".") or orphan:
                file.unlink()


def _part(first: int) -> str:
    """Name a part by its first prompt. It is the only part with this prompt."""
    return f"part-{first:08d}"


def _numbers(file: Path) -> list[int]:
    numbers: list[int] = pq.read_table(file, columns=["prompt"])["prompt"].to_pylist()
    return numbers


def _copied(path: Path, prompts: SurveyPrompts, request: SurveyRequest) -> Input:
    """Copy the prompts into the folder; a survey that has begun keeps its own copy."""
    own, copy = path / INPUT, path / f".{INPUT}"
    found = copy_prompts(prompts, copy, request)
    if (path / MANIFEST).exists():
        copy.unlink()
    else:
        copy.replace(own)
    return replace(found, path=own)


def _with_file(rows: Rows, file: str) -> Rows:
    """Set the column `file` of the table `tensors`."""
    batch = rows.batches.get("tensors")
    if batch is None:
        return rows
    index = batch.schema.get_field_index("file")
    files = pa.array([file] * batch.num_rows, pa.string())
    return replace(rows, batches=rows.batches | {"tensors": batch.set_column(index, "file", files)})


def _shown_labels(row: dict[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """Convert labels whose type differs between prompts to texts."""
    for name, kind in labels.items():
        value = row.get(f"label_{name}")
        if kind == "string" and value is not None and not isinstance(value, str):
            row[f"label_{name}"] = json.dumps(value)
    return row


def _write(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, flush it to the disk, and rename it."""
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_name(f".{target.name}")
    write(unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."

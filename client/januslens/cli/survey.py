"""The command `januslens survey`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from januslens.cli.options import (
    Connection,
    Number,
    model_option,
    usage_errors,
    with_connection,
)
from januslens.client import Client
from januslens.surveys.prompts import MESSAGES, SurveyRequest
from januslens.surveys.survey import MANIFEST, Survey, SurveyProgress

# Failures to print at the end.
_SHOWN = 5
# Seconds between two lines of progress, where there is no terminal for a bar.
_PERIOD = 10.0


def _request(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """Read `@FILE`, as in curl."""
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"cannot read {value[1:]!r}: {error}") from error


@click.command()
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of the results; an interrupted survey in it is resumed.",
)
@click.option(
    "--rpc",
    type=click.Choice(list(MESSAGES)),
    help="Method to call for each prompt; default: trace, or that of the survey to resume.",
)
@click.option(
    "--request",
    callback=_request,
    metavar="JSON",
    help="Fields of the request in protobuf JSON, or @FILE; default: those of the client's method, "
    "or of the survey to resume.",
)
@model_option
@click.option(
    "--replica",
    "replicas",
    multiple=True,
    metavar="ADDR",
    help="Further server that shares the prompts (repeatable).",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Calls at once to each server.",
)
@click.option(
    "--patience",
    type=Number(0.0, infinite=True),
    default=300.0,
    show_default=True,
    help="Maximum seconds without any result while servers are lost or busy.",
)
@click.option("--retry-failures", is_flag=True, help="Send the prompts again that failed before.")
@with_connection
def survey(
    connection: Connection,
    /,
    *,
    prompts: Path,
    out: Path,
    rpc: str | None,
    request: str | None,
    model: str,
    **options: Any,
) -> None:
    """Send every prompt of PROMPTS, and write the results as Parquet files.

    Each line of PROMPTS is a text or a JSON object with a prompt or messages, and optionally a
    target, another token, a subject, probes, an id and labels. Run the same command again to
    resume.
    """
    with usage_errors():
        asked = _asked(out, rpc, request, model)
        client = Client(**connection)
    with client, usage_errors(), _progress() as show:
        try:
            found = client.survey(prompts, out, rpc=asked, on_progress=show, **options)
        except OSError as error:
            raise click.ClickException(str(error)) from error
    _summarise(found)


def _asked(out: Path, rpc: str | None, request: str | None, model: str) -> SurveyRequest:
    """Return the request of the options; without any, that of the survey to resume.

    Raises:
        ValueError: The text is not a request of the method, or names another model.
    """
    if request is not None:
        found = SurveyRequest.from_json(rpc or "trace", request)
    elif rpc is None and (out / MANIFEST).exists():
        manifest = Survey.open(out).manifest
        found = SurveyRequest.from_json(manifest["rpc"], json.dumps(manifest["request"]))
    else:
        found = SurveyRequest.of(rpc or "trace", {})
    if model and found.template.model not in ("", model):
        raise ValueError(
            f"--model is {model}, but the request is for {found.template.model}; give one model"
        )
    if model:
        found.template.model = model
    return found


@contextmanager
def _progress() -> Iterator[Callable[[SurveyProgress], object]]:
    """Show the rate and the remaining time: as a bar on a terminal, otherwise as lines."""
    out = Console(stderr=True)
    if not out.is_terminal:
        yield _Lines()
        return
    rate = TextColumn("{task.fields[rate]}")
    with Progress(
        BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=out
    ) as bar:
        task = bar.add_task("", total=None, rate="")

        def show(progress: SurveyProgress) -> None:
            reached = progress.done + progress.failed
            bar.update(task, total=progress.total, completed=reached, rate=_rate(progress))

        yield show


class _Lines:
    """Prints a line of progress from time to time."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, progress: SurveyProgress) -> None:
        """Print the progress if the last line is old."""
        if time.monotonic() - self._last < _PERIOD:
            return
        self._last = time.monotonic()
        left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
        reached = progress.done + progress.failed
        click.echo(f"{reached} of {progress.total} prompts, {_rate(progress)}{left}", err=True)


def _rate(progress: SurveyProgress) -> str:
    retries = f", {progress.retries} retries" if progress.retries else ""
    failed = f", {progress.failed} failed" if progress.failed else ""
    return f"{progress.per_second:.3g} per second{failed}{retries}"


def _summarise(found: Survey) -> None:
    results, failures = found.manifest["results"], found.manifest["failures"]
    click.echo(f"{results} results in {found.path}: {', '.join(found.tables)}")
    if failures:
        click.echo(f"{failures} prompts failed; --retry-failures sends them again:", err=True)
        for row in found.dataset("failures").head(_SHOWN).to_pylist():
            name = row["id"] or f"prompt {row['prompt']}"
            click.echo(f"  {name}: {row['reason']}: {row['message']}", err=True)

"""Run a survey as a Ray Data pipeline, whose actors call the servers and write the parts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from januslens._connection import Connection, channel_credentials
from januslens.results.models import Model
from januslens.surveys.folder import SurveyFolder
from januslens.surveys.prompts import Input, SurveyPrompt, SurveyPrompts, SurveyRequest
from januslens.surveys.runner import PART_PROMPTS, Plan, Sender, calls_to, ready_model
from januslens.surveys.survey import Survey


def survey_on_ray(  # noqa: PLR0913 - by keyword
    prompts: SurveyPrompts,
    out: str | Path,
    *,
    servers: Sequence[str],
    rpc: str | SurveyRequest = "trace",
    actors: int | None = None,
    concurrency: int = 4,
    timeout: float | None = None,
    patience: float = 300.0,
    retry_failures: bool = False,
    token: str | None = None,
    root_certificates: str | Path | None = None,
    client_certificate: tuple[str | Path, str | Path] | None = None,
    secure: bool = False,
    **options: Any,
) -> Survey:
    """Send many prompts from the actors of a Ray Data pipeline, and write Parquet files.

    The folder is that of `client.survey`, on a file system that all nodes share. Requires ray.

    Args:
        prompts: Path of a file with a prompt in each line, or the prompts themselves.
        out: The folder; an interrupted survey in it is resumed.
        servers: Addresses of the servers, which share the prompts.
        rpc: The method to call, or a request made by `SurveyRequest.from_json`.
        actors: Number of actors, each of which calls all servers; None = one for each server.
        concurrency: Number of calls at once from each actor to each server.
        timeout: Maximum seconds for each call; None = no limit.
        patience: Maximum seconds without any result while servers are lost or busy.
        retry_failures: When a survey is resumed, also send the prompts that failed before.
        token: Bearer token.
        root_certificates: Use TLS with the root certificates in this PEM file.
        client_certificate: Use mutual TLS with the certificate and the key in these PEM files.
        secure: Use TLS with the system's root certificates.
        options: Arguments of the method, the same for all prompts.

    Raises:
        TypeError: An argument or a prompt has an invalid type.
        ValueError: An argument or a prompt has an invalid value, or the folder has another survey.
        OSError: A file cannot be read or written, or another process writes to the folder.
        JanuslensError: Every prompt would fail, or no server answers.
    """
    request = rpc if isinstance(rpc, SurveyRequest) else SurveyRequest.of(rpc, options)
    job = _Job(
        servers=tuple(servers),
        token=token,
        files={
            "secure": secure,
            "root_certificates": root_certificates,
            "client_certificate": client_certificate,
        },
        plan={"concurrency": concurrency, "timeout": timeout, "patience": patience},
        request=request,
    )
    with SurveyFolder.opened(out, prompts, request) as folder:
        model = asyncio.run(job.model())
        folder.begin(request, model)
        if retry_failures:
            folder.forget_failures()
        if pending := list(_blocks(folder)):
            made = ray.data.from_arrow(pending).map_batches(
                _Actor,
                batch_format="pyarrow",
                batch_size=PART_PROMPTS,
                concurrency=actors or len(servers),
                fn_constructor_args=(job, str(folder.path.resolve()), folder.input, model),
            )
            # By default, Ray raises an exception of its own, without the actor's.
            made.context.raise_original_map_exception = True
            try:
                for _ in made.iter_batches(batch_format="pyarrow"):
                    pass
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            folder.remove_orphans()  # of actors that were killed
        return folder.finish()


@dataclass(frozen=True)
class _Job:
    """What an actor needs to call the servers; it can be sent to another process.

    Attributes:
        servers: Addresses of the servers.
        token: Bearer token.
        files: Arguments of `channel_credentials`. Each process reads the certificates itself.
        plan: Further arguments of `Plan`.
        request: The request of every prompt.
    """

    servers: tuple[str, ...]
    token: str | None
    files: Mapping[str, Any]
    plan: Mapping[str, Any]
    request: SurveyRequest

    def connected(self) -> Plan:
        """Return the plan with connections to the servers."""
        encryption = channel_credentials(credentials=None, **self.files)
        connections = [
            Connection(address, self.token, None, encryption, resume=True, on_response=None)
            for address in self.servers
        ]
        return Plan(connections, **self.plan)

    async def model(self) -> Model:
        """Return the model of the survey."""
        plan = self.connected()
        async with calls_to(plan.connections) as servers:
            return await ready_model(servers, self.request.template.model, plan.patience)


def _blocks(folder: SurveyFolder) -> Iterator[pa.Table]:
    """Yield the prompts without a result, a table for each part."""
    done, _ = folder.done()
    with folder.input.path.open(encoding="utf-8") as lines:
        pending = ((number, line) for number, line in enumerate(lines) if not done[number])
        while block := list(islice(pending, PART_PROMPTS)):
            numbers, texts = zip(*block, strict=True)
            yield pa.table({"number": pa.array(numbers, pa.int64()), "line": pa.array(texts)})


class _Actor:
    """Sends the prompts of a batch, and writes a part."""

    def __init__(self, job: _Job, path: str, found: Input, model: Model) -> None:
        self._job = job
        self._folder = SurveyFolder(Path(path), found)
        self._model = model

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the number of results and failures of a batch.

        Ray repeats a batch whose actor was killed. What it has written before is left out.
        """
        pairs = list(zip(batch["number"].to_pylist(), batch["line"].to_pylist(), strict=True))
        written = self._folder.written(number for number, _ in pairs)
        pending = [SurveyPrompt.from_line(*pair) for pair in pairs if pair[0] not in written]
        sender = asyncio.run(self._sent(pending))
        return pa.table({"results": [sender.results], "failures": [sender.failures]})

    async def _sent(self, pending: list[SurveyPrompt]) -> Sender:
        plan = self._job.connected()
        sender = Sender(self._folder, iter(pending), self._job.request, self._model, plan)
        async with calls_to(plan.connections) as servers:
            await sender.send(servers)
        return sender

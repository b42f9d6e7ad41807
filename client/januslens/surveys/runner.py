"""Run a survey: send each prompt to one of several servers, and write the results in parts.

Each server has a few workers. A worker takes the next prompt, waits for its result and adds it to
the current part. A prompt whose call was interrupted or refused for a time is sent again, perhaps
to another server. A prompt that a server cannot serve becomes a failure.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

from januslens._connection import Connection, poll_seconds
from januslens.aio_calls import AsyncCalls
from januslens.assemblers import (
    ActivationsAssembler,
    Assembler,
    GenerateAssembler,
    GradientAssembler,
    InterveneAssembler,
    TraceAssembler,
)
from januslens.errors import (
    Aborted,
    ErrorDetails,
    JanuslensError,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    PermissionDenied,
    StreamInterrupted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from januslens.results.generation import GeneratedText
from januslens.results.models import Model
from januslens.surveys.folder import SurveyFolder
from januslens.surveys.prompts import SurveyPrompt, SurveyPrompts, SurveyRequest
from januslens.surveys.survey import Survey, SurveyProgress
from januslens.surveys.tables import (
    Reader,
    Rows,
    activation_rows,
    edit_rows,
    effect_rows,
    generation_rows,
    gradient_rows,
    trace_rows,
)
from januslens.v1 import models_pb2

logger = logging.getLogger("januslens")

# The gRPC method of each stream, what assembles its messages, and what reads its result.
_CALLS: Mapping[str, tuple[str, Callable[[], Assembler[Any, Any, Any]], Reader]] = {
    "trace": ("Trace", TraceAssembler, trace_rows),
    "gradient_lens": ("GradientLens", GradientAssembler, gradient_rows),
    "intervene": ("Intervene", InterveneAssembler, effect_rows),
    "activations": ("Activations", ActivationsAssembler, activation_rows),
    "generate": ("Generate", lambda: GenerateAssembler(GeneratedText), generation_rows),
}

# Failures that every prompt would have.
_OF_ALL = (
    ModelFailed,
    ModelNotFound,
    PermissionDenied,
    Unauthenticated,
    Unimplemented,
)
# The error for a model of each state but READY.
_NOT_READY: Mapping[str, tuple[type[JanuslensError], ErrorDetails]] = {
    "FAILED": (ModelFailed, ErrorDetails("FAILED_PRECONDITION", "MODEL_FAILED")),
    "LOADING": (ModelLoading, ErrorDetails("UNAVAILABLE", "MODEL_LOADING")),
}
# Interrupted calls of one prompt, after which it counts as failed: it may be what stops the server.
_MAX_INTERRUPTIONS = 10
# Failures before the first result, after which the survey stops: its request may be invalid.
_MAX_FIRST_FAILURES = 20
_LONGEST_PAUSE = 10.0

# A part is written when it has this many prompts, bytes, or seconds since its first result.
PART_PROMPTS = 256
PART_BYTES = 64 * 2**20
PART_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """How a survey is run.

    Attributes:
        connections: The servers, which share the prompts.
        concurrency: Number of calls at once to each server.
        timeout: Maximum seconds for each call; None = the client's.
        patience: Maximum seconds without any result while servers are lost or busy.
        retry_failures: Send the prompts again that failed before.
        on_progress: Called after each prompt.
    """

    connections: Sequence[Connection]
    concurrency: int = 4
    timeout: float | None = None
    patience: float = 300.0
    retry_failures: bool = False
    on_progress: Callable[[SurveyProgress], object] | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: The concurrency is below 1, or the patience is negative.
        """
        if self.concurrency < 1:
            raise ValueError(f"invalid concurrency {self.concurrency}; expected at least 1")
        if not self.patience >= 0:
            raise ValueError(f"invalid patience {self.patience}; expected 0 or more seconds")


async def run_survey(
    prompts: SurveyPrompts, out: str | Path, request: SurveyRequest, plan: Plan
) -> Survey:
    """Run or resume a survey; return it when every prompt has a result or a failure."""
    # Prompts and folder are checked before anything is sent.
    with SurveyFolder.opened(out, prompts, request) as folder:
        async with calls_to(plan.connections) as servers:
            model = await ready_model(servers, request.template.model, plan.patience)
            folder.begin(request, model)
            if plan.retry_failures:
                folder.forget_failures()
            done, failed = folder.done()
            before, begun = sum(done), time.monotonic()

            def report(sender: Sender) -> None:
                if plan.on_progress is None:
                    return
                here, total = sender.results + sender.failures, len(done)
                rate = here / max(time.monotonic() - begun, 1e-9)
                plan.on_progress(
                    SurveyProgress(
                        total=total,
                        done=before - failed + sender.results,
                        failed=failed + sender.failures,
                        per_second=rate,
                        seconds_left=(total - before - here) / rate if rate else None,
                        retries=sender.retries,
                    )
                )

            sender = Sender(folder, folder.input.prompts(done), request, model, plan, report)
            await sender.send(servers)
        return folder.finish()


@asynccontextmanager
async def calls_to(connections: Iterable[Connection]) -> AsyncIterator[list[SurveyCalls]]:
    """Open the calls to several servers, and close them at the end.

    Raises:
        ValueError: A connection has interceptors of a synchronous client.
    """
    resuming = [replace(connection, resume=True) for connection in connections]
    for connection in resuming:
        if not all(isinstance(one, grpc.aio.ClientInterceptor) for one in connection.interceptors):
            raise ValueError("a survey cannot use interceptors of a Client; use an AsyncClient")
    servers = [SurveyCalls(connection) for connection in resuming]
    try:
        yield servers
    finally:
        for server in servers:
            await server.close()


class SurveyCalls(AsyncCalls):
    """The calls of a survey to one server."""

    async def models(self, name: str) -> list[Model]:
        """Return the models of this name; all of them for an empty name."""
        found: list[Model] = []
        request: models_pb2.ListModelsRequest | None = models_pb2.ListModelsRequest()
        while request is not None:
            page = await self._send("ListModels", request, None)
            found += [Model.from_message(one) for one in page.models if name in ("", one.name)]
            token = page.next_page_token
            request = models_pb2.ListModelsRequest(page_token=token) if token else None
        return found

    async def rows(
        self, request: SurveyRequest, prompt: SurveyPrompt, model: Model, seconds: float | None
    ) -> Rows:
        """Return the rows of one prompt, within some seconds."""
        message = request.message(prompt, model.name, model.provenance.revision)
        if request.rpc == "preview_edits":
            return edit_rows(prompt.number, await self._send("PreviewEdit", message, seconds))
        method, assembler, read = _CALLS[request.rpc]
        async with self._stream(method, message, seconds, assembler()) as stream:
            return read(prompt.number, await stream.result())


async def ready_model(servers: Sequence[SurveyCalls], name: str, patience: float) -> Model:
    """Return a model from the first server where it is loaded.

    It is the model of this name; without a name, the one that a request without a name would use.

    Raises:
        ValueError: There is no such model; or none is named, and several serve or none does.
        JanuslensError: No server can be reached in time, or the model is not loaded in time.
    """
    started, attempts = time.monotonic(), 0
    while True:
        waited = time.monotonic() - started
        late = waited >= patience
        try:
            models = await servers[attempts % len(servers)].models(name)
        except Unavailable:
            if late:
                raise
        else:
            usable = [model for model in models if model.state in ("LOADING", "READY")] or models
            if name and not usable:
                raise ValueError(f"the server has no model {name!r}")
            if len(usable) != 1:
                found = ", ".join(model.name for model in usable) or "no model"
                raise ValueError(f"no model given: expected one of {found}")
            (model,) = usable
            if model.ready:
                return model
            if model.state == "FAILED" or late:
                reason = model.state_reason or "it is still loading"
                kind, details = _NOT_READY[model.state]
                raise kind(f"model {model.name!r} is not ready: {reason}", details)
        attempts += 1
        await asyncio.sleep(poll_seconds(waited))


@dataclass
class _Part:
    """Results and failures that have not been written."""

    results: list[tuple[SurveyPrompt, Rows]] = field(default_factory=list)
    failures: list[tuple[SurveyPrompt, JanuslensError]] = field(default_factory=list)
    size: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def full(self) -> bool:
        count = len(self.results) + len(self.failures)
        late = time.monotonic() - self.begun >= PART_SECONDS
        return bool(count) and (late or count >= PART_PROMPTS or self.size >= PART_BYTES)


class Sender:
    """Sends prompts to servers, and writes what they answer.

    Attributes:
        results: Number of results received.
        failures: Number of prompts that failed.
        retries: Number of calls that were repeated.
    """

    def __init__(
        self,
        folder: SurveyFolder,
        pending: Iterator[SurveyPrompt],
        request: SurveyRequest,
        model: Model,
        plan: Plan,
        report: Callable[[Sender], object] = lambda _: None,
    ) -> None:
        """`report` is called after each of the `pending` prompts."""
        self.results = self.failures = self.retries = 0
        self._folder = folder
        self._pending = pending
        self._request = request
        self._model = model
        self._plan = plan
        self._report = report
        self._returned: deque[SurveyPrompt] = deque()
        self._interruptions: Counter[int] = Counter()
        self._part = _Part()
        self._writing = asyncio.Lock()
        self._last_result = time.monotonic()

    async def send(self, servers: Sequence[SurveyCalls]) -> None:
        """Send all pending prompts; what has been received is written in any case.

        Raises:
            JanuslensError: Every prompt would fail, or no server has answered for too long.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for server in servers:
                    for _ in range(self._plan.concurrency):
                        group.create_task(self._work(server))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            await self._write()

    async def _work(self, server: SurveyCalls) -> None:
        fruitless = 0
        while (prompt := self._next()) is not None:
            try:
                rows = await server.rows(self._request, prompt, self._model, self._plan.timeout)
            except JanuslensError as error:
                self._check(error)
                if pause := self._pause(prompt, error, fruitless):
                    fruitless += 1
                    self._returned.append(prompt)
                    await asyncio.sleep(pause)
                    continue
                self.failures += 1
                self._part.failures.append((prompt, error))
            else:
                self.results += 1
                self._part.results.append((prompt, rows))
                self._part.size += rows.size
                self._last_result = time.monotonic()
            fruitless = 0
            self._report(self)
            if self._part.full:
                await self._write()

    def _next(self) -> SurveyPrompt | None:
        return self._returned.popleft() if self._returned else next(self._pending, None)

    def _check(self, error: JanuslensError) -> None:
        """Raise the error if every prompt would fail, or if the servers have been lost for long."""
        waited = time.monotonic() - self._last_result
        lost = _passing(error) and waited > self._plan.patience
        fruitless = self.failures >= _MAX_FIRST_FAILURES and not self.results
        hopeless = fruitless and not self._folder.has_results
        if isinstance(error, _OF_ALL) or lost or hopeless:
            raise error

    def _pause(self, prompt: SurveyPrompt, error: JanuslensError, fruitless: int) -> float:
        """Return the seconds to wait before another attempt; 0 if the prompt has failed."""
        if not _passing(error):
            return 0.0
        if isinstance(error, StreamInterrupted):
            self._interruptions[prompt.number] += 1
            if self._interruptions[prompt.number] >= _MAX_INTERRUPTIONS:
                return 0.0
        self.retries += 1
        logger.warning("prompt %d is sent again: %s", prompt.number, error.message)
        return max(error.retry_after or 0.0, min(_LONGEST_PAUSE, 0.1 * 2.0**fruitless))

    async def _write(self) -> None:
        """Write the current part, even if this task is cancelled meanwhile."""
        await asyncio.shield(self._save())

    async def _save(self) -> None:
        """Write the current part after the one before; meanwhile, results go to the next one."""
        async with self._writing:
            part, self._part = self._part, _Part()
            if part.results:
                await asyncio.to_thread(self._folder.write, part.results)
            if part.failures:
                await asyncio.to_thread(self._folder.write_failures, part.failures)


def _passing(error: JanuslensError) -> bool:
    """Whether the same call may succeed later."""
    lost = isinstance(error, (Aborted, StreamInterrupted, Unavailable))
    return lost or error.retry_after is not None

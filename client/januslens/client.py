"""The synchronous client. Generated from `aio.py` by client/generate.py; do not edit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from numpy.typing import ArrayLike

from januslens._connection import (
    DEFAULT_ADDRESS,
    Connection,
    Metadata,
    ResponseHook,
    WaitingHook,
    channel_credentials,
)
from januslens._requests import (
    find_neurons_request,
    next_page_request,
    overview_request,
    preview_edit_request,
    preview_edits_request,
    project_request,
    tokenize_request,
)
from januslens.arguments import (
    Chat,
    Edit,
    Layers,
    Messages,
    Probe,
    Prompt,
    TargetLike,
    Text,
    checked_text,
)
from januslens.assemblers import TraceAssembler
from januslens.calls import EventStream, Generation
from januslens.interventions import Intervention
from januslens.lenses import Lenses
from januslens.passes import Passes
from januslens.results.exports import require
from januslens.results.generation import Explanation, check_completion, listed_logarithm
from januslens.results.gradient import EditPreview, EditPreviews
from januslens.results.kinds import Lens, MatrixKind, NodeKind
from januslens.results.models import Model, Models, ServerInfo
from januslens.results.tokens import Token, Tokens, TokenTable
from januslens.results.trace import Trace
from januslens.results.vectors import FoundNeurons, Projection, Projections
from januslens.surveys.prompts import SurveyPrompts, SurveyRequest
from januslens.surveys.survey import Survey, SurveyProgress
from januslens.v1 import admin_pb2, models_pb2, neurons_pb2, server_pb2

__all__ = ["Client", "EventStream", "Generation"]

# Tokens that `explain` lists at each position, the most that a server lists.
LISTED = 1000


class Client(Lenses, Passes):
    """An synchronous client of a Januslens server.

    Close it, or use it as a context manager.
    Threads may share it.

    Args:
        address: `host:port` of the server, or a name that gRPC resolves, such as
            `dns:///januslens-headless:50051`; calls are balanced over all of its addresses. gRPC
            uses port 443 for an address without a port.
        token: Bearer token, sent as `authorization: Bearer ...`. Without TLS, others on the network
            can read it.
        timeout: Maximum seconds for calls that are made without a timeout; None = no limit.
        secure: Use TLS with the system's root certificates.
        root_certificates: Use TLS with the root certificates in this PEM file.
        client_certificate: Use mutual TLS with the certificate and the private key in these two PEM
            files.
        credentials: Use these channel credentials, such as those of `grpc.ssl_channel_credentials`.
        resume: Resume interrupted calls on another replica instead of raising an exception.
        on_response: Called with every response message on arrival, for example to record it.
        on_waiting: Called with the place of a request that waits for the device, first after half a
            second and then every second until it starts. Only for calls that stream; a client
            without it is sent nothing while it waits.
        metadata: Pairs of gRPC metadata to send with every call; the values of keys that end with
            `-bin` are bytes.
        interceptors: gRPC client interceptors, such as those of OpenTelemetry, the outermost first:
            of `grpc.aio` for an `Client`, of `grpc` for a `Client`.

    Raises:
        TypeError: The timeout is not a number, or a value of the metadata has an invalid type.
        ValueError: The address is a URL, the timeout is negative or NaN, the metadata is not valid,
            or there are both credentials and certificates.
        OSError: A certificate cannot be read.
    """

    def __init__(  # noqa: PLR0913 - by keyword
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        timeout: float | None = None,
        secure: bool = False,
        root_certificates: str | Path | None = None,
        client_certificate: tuple[str | Path, str | Path] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        resume: bool = False,
        on_response: ResponseHook | None = None,
        on_waiting: WaitingHook | None = None,
        metadata: Metadata = (),
        interceptors: Sequence[Any] = (),
    ) -> None:
        encryption = channel_credentials(
            secure=secure,
            root_certificates=root_certificates,
            client_certificate=client_certificate,
            credentials=credentials,
        )
        super().__init__(
            Connection(
                address,
                token,
                timeout,
                encryption,
                resume,
                on_response,
                tuple(metadata),
                tuple(interceptors),
                on_waiting,
            )
        )

    def trace_overview(
        self,
        trace: Trace,
        *,
        lens: Lens | str = Lens.FINAL_NORM,
        top_k: int | None = 3,
        timeout: float | None = None,
    ) -> Trace:
        """Trace the residual stream around a trace: all positions, with few nodes at each.

        Pass the result to `trace.to_html(overview)`. It has the same model, prompt and layers as
        the trace. It also has the same target if the trace has only one; otherwise the target is
        the model's own next token at each position. Nodes that are in both traces are equal.
        Overviews of short prompts include the strongest heads. Those of very long prompts leave
        out the earliest positions.

        Args:
            trace: The trace to surround.
            lens: The lens of the trace, which the trace itself does not contain.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            TraceInterrupted: The stream was interrupted; `partial` has the layers received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = overview_request(trace, lens=lens, top_k=top_k)
        with self._stream("Trace", request, timeout, TraceAssembler()) as stream:
            return stream.result()

    def explain(
        self,
        prompt: Prompt | Messages,
        completion: str | Sequence[int],
        *,
        token: int = -1,
        log_probabilities: Sequence[float] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
        **options: Any,
    ) -> Explanation:
        """Trace a token of a text that another system generated, for example a logged answer.

        Args:
            prompt: The prompt, as text, token ids, a list of messages or a `Chat`.
            completion: The text that followed it, or its token ids, which are more reliable.
            token: Number of the token to trace, from 0, or negative from the end.
            log_probabilities: Natural logarithms of the tokens' probabilities that the other system
                reported, to compare with.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for each of the calls; None = the client's.
            options: Further arguments of `trace`.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts, or there are not as many
                log-probabilities as tokens.
            IndexError: There is no such token.
            JanuslensError: A call failed; `januslens.errors` has the types.
        """
        named: dict[str, Any] = {"model": model, "revision": revision, "timeout": timeout}
        before = self._prompt_ids(prompt, named)
        said = completion
        if isinstance(said, str):
            said = [found.id for found in self.tokenize(said, literal=True, **named)]
        check_completion(said, token, log_probabilities)
        ids, first = [*before, *said], len(before) - 1
        kinds = [NodeKind.PREDICTION]
        predictions = self.trace(
            ids,
            positions=range(first, first + len(said)),
            node_kinds=kinds,
            top_k=LISTED,
            bottom_k=0,
            **named,
        )
        own = []
        for i, token_id in enumerate(said):
            found = listed_logarithm(predictions, first + i, token_id)
            if found is None:  # not among the most likely tokens
                one = self.trace(
                    ids[: first + 1 + i], token_id, node_kinds=kinds, top_k=0, bottom_k=0, **named
                )
                found = one.target().target_log_probability
            own.append(found)
        number = token % len(said)
        trace = self.trace(ids[: first + 1 + number], said[number], **named, **options)
        tokens = Tokens(predictions.prompt_tokens[len(before) :])
        return Explanation(trace, number, tokens, tuple(own), tuple(log_probabilities))

    def _prompt_ids(self, prompt: Prompt | Messages, named: dict[str, Any]) -> list[int]:
        """Return the token ids of a prompt."""
        if isinstance(prompt, (str, Text)):
            text = prompt if isinstance(prompt, Text) else Text(prompt)
            if not text.special_tokens:
                raise ValueError("special_tokens=False is not supported here; give token ids")
            tokens = self.tokenize(text.text, special_tokens=True, literal=text.literal, **named)
            return [token.id for token in tokens]
        if isinstance(prompt, Chat) or isinstance(next(iter(prompt), None), Mapping):
            messages = prompt if isinstance(prompt, Chat) else Chat(list(prompt))  # type: ignore[arg-type]  # mappings
            return [token.id for token in self.tokenize(messages=messages, **named)]
        return list(prompt)  # type: ignore[arg-type]  # ids

    def survey(  # noqa: PLR0913 - by keyword
        self,
        prompts: SurveyPrompts,
        out: str | Path,
        *,
        rpc: str | SurveyRequest = "trace",
        replicas: Iterable[str] = (),
        concurrency: int = 4,
        timeout: float | None = None,
        patience: float = 300.0,
        retry_failures: bool = False,
        on_progress: Callable[[SurveyProgress], object] | None = None,
        **options: Any,
    ) -> Survey:
        """Send many prompts, and write the results to a folder of Parquet files.

        A survey that was interrupted, even by a crash, is resumed by the same call: it sends only
        the prompts that have no result yet. docs/surveys.md describes the files. Requires pyarrow.

        Args:
            prompts: Path of a file with a prompt in each line, as text or as a JSON object, or the
                prompts themselves: texts, token ids, chats or mappings.
            out: The folder; created if it does not exist.
            rpc: The method to call: `trace`, `gradient_lens`, `intervene`, `activations`,
                `generate` or `preview_edits`, or a request made by `SurveyRequest.from_json`.
            replicas: Addresses of further servers that share the prompts.
            concurrency: Number of calls at once to each server.
            timeout: Maximum seconds for each call; None = the client's.
            patience: Maximum seconds without any result while servers are lost or busy.
            retry_failures: When a survey is resumed, also send the prompts that failed before.
            on_progress: Called with the progress after each prompt.
            options: Arguments of the method, the same for all prompts.

        Raises:
            TypeError: An argument or a prompt has an invalid type.
            ValueError: An argument or a prompt has an invalid value, or the folder has a survey of
                other prompts, options or weights.
            OSError: A file cannot be read or written, or another process writes to the folder.
            JanuslensError: Every prompt would fail, or no server answers.
        """
        require("pyarrow", "analysis", "a survey")
        from januslens.surveys.runner import Plan, run_survey  # noqa: PLC0415 - needs pyarrow

        request = rpc if isinstance(rpc, SurveyRequest) else SurveyRequest.of(rpc, options)
        addresses = (self._connection.address, *replicas)
        plan = Plan(
            connections=[replace(self._connection, address=address) for address in addresses],
            concurrency=concurrency,
            timeout=timeout,
            patience=patience,
            retry_failures=retry_failures,
            on_progress=on_progress,
        )
        return self._channel.finished(run_survey(prompts, out, request, plan))

    def preview_edit(
        self,
        prompt: Prompt,
        target: TargetLike,
        edit: Edit,
        *,
        probes: Iterable[Probe | str] = (),
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EditPreview:
        """Preview the effect of an edit on the prompt and on others; the model is not changed.

        Args:
            prompt: The prompt to edit the model for, as text or token ids.
            target: The answer that the edit makes more likely: text, in which a leading space
                counts, one token id or several. Ranks and probabilities are reported for its first
                token.
            edit: A `DescentStep` or a `ForwardShift`.
            probes: Other prompts to report before and after the edit.
            interventions: Changes of every forward pass, also of the one that the edit is computed
                from, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = preview_edit_request(
            prompt,
            target,
            edit,
            probes=probes,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        response = self._send("PreviewEdit", request, timeout)
        return EditPreview.from_message(response)

    def preview_edits(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt,
        target: TargetLike,
        *,
        learning_rates: Iterable[float] = (),
        etas: Iterable[float] = (),
        layers: Layers | None = None,
        matrices: Iterable[MatrixKind | str] | None = None,
        gradient_cosine: bool = False,
        probes: Iterable[Probe | str] = (),
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EditPreviews:
        """Preview a grid of edits, one for each layer and each strength, each applied alone.

        The passes before the edits and the one that they are computed from run once.

        Args:
            prompt: The prompt to edit the model for, as text or token ids.
            target: The answer that the edits make more likely, as in `preview_edit`.
            learning_rates: Learning rates of descent steps; give these or `etas`.
            etas: Strengths of forward shifts.
            layers: Layers, from 0 or negative from the last; None = all that the edit can change.
            matrices: Kinds of matrices that a descent step changes; None = FF1 and FF2.
            gradient_cosine: Also compare each forward shift with a descent step, which takes a
                backward pass.
            probes: Other prompts to report before and after each edit.
            interventions: Changes of every forward pass, as in `preview_edit`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = preview_edits_request(
            prompt,
            target,
            learning_rates=learning_rates,
            etas=etas,
            layers=layers,
            matrices=matrices,
            gradient_cosine=gradient_cosine,
            probes=probes,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        response = self._send("PreviewEdit", request, timeout)
        return EditPreviews.from_message(response)

    def project(
        self,
        vectors: ArrayLike,
        *,
        target: TargetLike | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        top_k: int | None = None,
        bottom_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Projections:
        """Project vectors of your own, such as probes or dictionary features, to the vocabulary.

        Args:
            vectors: `[d_model]` or `[n, d_model]`, in the basis of the residual stream.
            target: The token whose rank is reported: text of one token, or a token id.
            lens: `FINAL_NORM`, `NORMALIZED` (scale each vector to length 1 first) or `RAW`.
            top_k: Most likely tokens per vector; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per vector; None = the server's default, 0 = none.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Returns:
            One projection per vector.

        Raises:
            TypeError: The vectors are not real numbers, or an argument has an invalid type.
            ValueError: The vectors have another shape or are not finite in float32, or an argument
                has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = project_request(
            vectors,
            target=target,
            lens=lens,
            top_k=top_k,
            bottom_k=bottom_k,
            model=model,
            revision=revision,
        )
        response = self._send("Project", request, timeout)
        tokens = TokenTable(response.tokens)
        return Projections(Projection.from_message(found, tokens) for found in response.projections)

    def find_neurons(
        self,
        token: TargetLike,
        *,
        suppressed: bool = False,
        layers: Layers | None = None,
        limit: int | None = 20,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> FoundNeurons:
        """Find the MLP neurons whose value, a row of FF2, promotes a token; no prompt is run.

        The first request for a layer may take long, because the server indexes the neurons of the
        layer.

        Args:
            token: Text of one token, in which a leading space counts, or a token id.
            suppressed: Find the neurons that suppress the token instead.
            layers: Layers to search, from 0 or negative from the last; None = all.
            limit: Maximum number of neurons, best rank first; None = all.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for each page of 1000 neurons; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request: neurons_pb2.FindNeuronsRequest | None = find_neurons_request(
            token,
            suppressed=suppressed,
            layers=layers,
            limit=limit,
            model=model,
            revision=revision,
        )
        pages: list[neurons_pb2.FindNeuronsResponse] = []
        left = limit
        while request is not None:
            page = self._send("FindNeurons", request, timeout)
            pages.append(page)
            left = None if left is None else left - request.page_size
            request = next_page_request(request, page, left)
        return FoundNeurons.from_messages(pages, suppressed=suppressed)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        special_tokens: bool = False,
        literal: bool = False,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Tokens:
        """Tokenize a text or a conversation, and return the characters that each token covers.

        Args:
            text: The text.
            messages: A conversation instead of a text: messages with `role` and `content`, or a
                `Chat`. Tokens of contents have the index of their message.
            special_tokens: Add the tokenizer's special tokens, as in a prompt. Targets have none.
            literal: Read characters that spell a control token as ordinary text.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = tokenize_request(
            text,
            messages=messages,
            special_tokens=special_tokens,
            literal=literal,
            model=model,
            revision=revision,
        )
        response = self._send("Tokenize", request, timeout)
        return Tokens(Token.from_message(token) for token in response.tokens)

    def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """Return one model with its state, sizes and self-check results.

        Args:
            name: The model's name; may be empty if only one is loaded.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            ModelNotFound: The server has no such model.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = models_pb2.GetModelRequest(model=checked_text(name, "name"))
        response = self._send("GetModel", request, timeout)
        return Model.from_message(response.model)

    def load_model(
        self, name: str, source: str, *, revision: str = "", timeout: float | None = None
    ) -> Model:
        """Begin to load a model, and return its state; `model(name)` then reports the progress.

        Requires the scope `admin`; docs/operations.md describes what an operator allows.

        Args:
            name: The name that requests will use.
            source: Absolute path of a folder or GGUF file on the server, or id of a hub model.
            revision: Branch, tag or commit of a hub model; empty = its default branch.
            timeout: Maximum seconds for the call, which does not wait for the model; None = the
                client's.

        Raises:
            PermissionDenied: The caller may not load models, or not from this source.
            ModelExists: Another model has the name, or the model is being unloaded.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = admin_pb2.LoadModelRequest(
            model=checked_text(name, "name"),
            source=checked_text(source, "source"),
            revision=checked_text(revision, "revision"),
        )
        return Model.from_message((self._send("LoadModel", request, timeout)).model)

    def unload_model(self, name: str, *, timeout: float | None = None) -> None:
        """Remove a model; return when its requests have finished and its memory is free.

        Requires the scope `admin`.

        Args:
            name: The model's name.
            timeout: Maximum seconds for the call; None = the client's. If they pass, the model is
                removed all the same.

        Raises:
            PermissionDenied: The caller may not unload models.
            ModelNotFound: The server has no such model.
            ModelLoading: The model is still loading.
            InvalidRequest: The model is the base of a LoRA, which must be unloaded first.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = admin_pb2.UnloadModelRequest(model=checked_text(name, "name"))
        self._send("UnloadModel", request, timeout)

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return the server's version and limits, and the RPCs that this client may use.

        Args:
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = server_pb2.GetServerInfoRequest()
        return ServerInfo.from_message(self._send("GetServerInfo", request, timeout))

    def list_models(
        self,
        *,
        timeout: float | None = None,
    ) -> Models:
        """List the configured models with their states, sizes and self-check results.

        Args:
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request: models_pb2.ListModelsRequest | None = models_pb2.ListModelsRequest()
        models = Models()
        while request is not None:
            page = self._send("ListModels", request, timeout)
            models += [Model.from_message(model) for model in page.models]
            following = page.next_page_token
            request = models_pb2.ListModelsRequest(page_token=following) if following else None
        return models

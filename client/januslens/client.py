"""The synchronous client. Generated from `aio.py` by client/unasync.py; do not edit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self

import grpc
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from januslens._channels import Channel
from januslens._connection import (
    DEFAULT_ADDRESS,
    Connection,
    ResponseHook,
    channel_credentials,
)
from januslens._requests import (
    activations_request,
    find_neurons_request,
    generate_request,
    gradient_lens_request,
    intervene_request,
    next_page_request,
    overview_request,
    preview_edit_request,
    project_request,
    tokenize_request,
    trace_request,
)
from januslens._resuming import ResumableCall, ResumableStream
from januslens.arguments import (
    Chat,
    Edit,
    Layers,
    Loss,
    Messages,
    Positions,
    Probe,
    Prompt,
    SubjectLike,
    TargetLike,
    Text,
)
from januslens.assemblers import (
    ActivationsAssembler,
    ActivationsEvent,
    Assembler,
    EventT,
    GenerateAssembler,
    GenerationEvent,
    GradientAssembler,
    GradientEvent,
    InterveneAssembler,
    InterveneEvent,
    ResultT,
    TraceAssembler,
    TraceEvent,
)
from januslens.errors import StreamInterrupted
from januslens.interventions import Experiment, Intervention, SweepOver
from januslens.results.activations import Activations
from januslens.results.generation import (
    Explanation,
    GeneratedText,
    check_completion,
    listed_logarithm,
    logarithm,
)
from januslens.results.gradient import EditPreview, Gradient
from januslens.results.intervene import InterventionEffects
from januslens.results.kinds import Lens, MatrixKind, NodeKind, Site
from januslens.results.models import CostEstimate, Model, Models
from januslens.results.tokens import Token, Tokens, TokenTable
from januslens.results.trace import Trace
from januslens.results.vectors import FoundNeurons, Projection, Projections
from januslens.v1 import cost_pb2, models_pb2, neurons_pb2

# Tokens that `explain` lists at each position, the most that a server lists.
LISTED = 1000


class EventStream(Generic[EventT, ResultT]):
    """The events of a stream: the header, each layer or matrix when it is complete, the summary.

    Iterate over it, or call `result()` for the whole result. Closing it, leaving its context or
    dropping the last reference to it cancels the call if it is still running.
    """

    def __init__(self, channel: Channel, call: ResumableStream[EventT, ResultT]) -> None:
        self._channel = channel
        self._call = call
        self._ready: deque[EventT] = deque()
        self._closed = False
        self._responses = channel.responses(call)

    @property
    def interruptions(self) -> tuple[StreamInterrupted, ...]:
        """The interruptions after which the stream was resumed on another replica."""
        return tuple(self._call.interruptions)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EventT:
        """Return the next event; a closed stream has none.

        Raises:
            StreamInterrupted: The stream was interrupted; `partial` has what was received.
            JanuslensError: The call failed; `partial` has what was received.
        """
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            self._advance()
        raise StopIteration

    def _advance(self) -> None:
        """Take the next message, or resume the interrupted call."""
        try:
            response = next(self._responses)
        except StopIteration:
            if self._closed or self._call.complete:
                raise
            self._call.failed(None)
        except grpc.RpcError as error:
            self._call.failed(error)
        else:
            self._ready.extend(self._call.take(response))
            return
        self._channel.sleep(self._call.pause)
        if not self._closed:
            self._responses = self._channel.responses(self._call)

    def result(self) -> ResultT:
        """Wait for the rest of the stream and return the whole result.

        Raises:
            StreamInterrupted: The stream was interrupted or closed before its summary.
            JanuslensError: The call failed; `partial` has what was received.
        """
        for _ in self:
            pass
        return self._call.result()

    def close(self) -> None:
        """Cancel the call if it is still running; the server stops computing."""
        self._closed = True
        self._responses.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Generation(GeneratedText):
    """A generated text, with methods that explain its tokens."""

    client: Client = field(repr=False, compare=False)

    def trace(self, token: int = -1, target: TargetLike | None = None, **options: Any) -> Trace:
        """Trace the forward pass that predicted a generated token.

        Args:
            token: Number of the generated token, from 0, or negative from the end.
            target: The token whose rank every projection reports; None = the generated token.
            options: Further arguments of `trace`.

        Raises:
            IndexError: There is no such token.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        ids = self.ids_before(token)
        wanted = self.tokens[token].token.id if target is None else target
        return self.client.trace(ids, wanted, **self._pinned(), **options)

    def gradient(
        self, token: int = -1, target: TargetLike | None = None, **options: Any
    ) -> Gradient:
        """Compute the gradients of a generated token's loss, or of another token in its place.

        Args:
            token: Number of the generated token, from 0, or negative from the end.
            target: The target of the loss; None = the generated token.
            options: Further arguments of `gradient_lens`.

        Raises:
            IndexError: There is no such token.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        ids = self.ids_before(token)
        wanted = self.tokens[token].token.id if target is None else target
        return self.client.gradient_lens(ids, wanted, **self._pinned(), **options)

    def _pinned(self) -> dict[str, Any]:
        """Name the model and revision that generated the text."""
        return {"model": self.provenance.model, "revision": self.provenance.revision}


class Client:
    """A synchronous client of a Januslens server.

    Close it, or use it as a context manager.
    Threads may share it.

    Args:
        address: `host:port` of the server, or a name that gRPC resolves, such as
            `dns:///januslens-headless:50051`; calls are balanced over all of its addresses.
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

    Raises:
        TypeError: The timeout is not a number.
        ValueError: The timeout is negative or NaN, or there are both credentials and certificates.
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
    ) -> None:
        encryption = channel_credentials(
            secure=secure,
            root_certificates=root_certificates,
            client_certificate=client_certificate,
            credentials=credentials,
        )
        self._connection = Connection(address, token, timeout, encryption, resume, on_response)
        self._channel = Channel(self._connection)

    def trace(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | None = None,
        memory_values: int | None = None,
        top_neurons: int | None = None,
        bottom_neurons: int | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        node_kinds: Iterable[NodeKind | str] | None = None,
        vectors: bool = False,
        logit_contribution: bool = True,
        overlap_k: int | None = None,
        checks: bool = False,
        projections: bool | None = None,
        interventions: Iterable[Intervention] = (),
        other: TargetLike | None = None,
        attribution: bool = False,
        gradients: bool = False,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Trace:
        """Trace the forward pass as a flow graph of vectors projected to the vocabulary (VISIT).

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The token whose rank every projection reports: text of one token, in which a
                leading space counts, or a token id. None = the model's own next token at each
                position.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            layers: Layers to send, from 0; None = all.
            positions: Query positions, negative from the end, or `"all"`; None = the last one.
            heads: Maximum heads per layer, largest norm first; None = the server's default, 0 =
                all.
            memory_values: Maximum source positions per head, largest attention first; None = the
                server's default, 0 = all.
            top_neurons: Maximum neurons per MLP, largest activation times norm first; None = the
                server's default, 0 = all.
            bottom_neurons: Maximum neurons per MLP, most negative first; None = the server's
                default, 0 = none.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (scale each vector to length 1 first) or `RAW`.
            node_kinds: Node kinds to send; None = all. Hiding nodes does not change any sum.
            vectors: Send the vectors of the nodes.
            logit_contribution: Send each part's contribution to the target's logit.
            overlap_k: Send each edge's intersection score, computed on this many top tokens.
            checks: Repeat the model's self-check on this request and report it in the summary.
            projections: Project the nodes to the vocabulary, which takes most of the time of a
                trace; None = yes, unless `top_k` and `bottom_k` are 0.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            other: A second token: logit contributions and attributions are those of the difference
                between the target's logit and this token's logit.
            attribution: Send each part's first-order effect on the target's logit at the last
                position of the trace, and the norms of the states' gradients. This takes a backward
                pass.
            gradients: Send the gradients of the states, projected to the vocabulary.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            TraceInterrupted: The stream was interrupted; `partial` has the layers received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_trace(
            prompt,
            target,
            messages=messages,
            layers=layers,
            positions=positions,
            heads=heads,
            memory_values=memory_values,
            top_neurons=top_neurons,
            bottom_neurons=bottom_neurons,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            node_kinds=node_kinds,
            vectors=vectors,
            logit_contribution=logit_contribution,
            overlap_k=overlap_k,
            checks=checks,
            projections=projections,
            interventions=interventions,
            other=other,
            attribution=attribution,
            gradients=gradients,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        with stream:
            return stream.result()

    def stream_trace(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | None = None,
        memory_values: int | None = None,
        top_neurons: int | None = None,
        bottom_neurons: int | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        node_kinds: Iterable[NodeKind | str] | None = None,
        vectors: bool = False,
        logit_contribution: bool = True,
        overlap_k: int | None = None,
        checks: bool = False,
        projections: bool | None = None,
        interventions: Iterable[Intervention] = (),
        other: TargetLike | None = None,
        attribution: bool = False,
        gradients: bool = False,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EventStream[TraceEvent, Trace]:
        """Trace the forward pass as in `trace`, and receive each layer when it is complete.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The token whose rank every projection reports: text of one token, in which a
                leading space counts, or a token id. None = the model's own next token at each
                position.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            layers: Layers to send, from 0; None = all.
            positions: Query positions, negative from the end, or `"all"`; None = the last one.
            heads: Maximum heads per layer, largest norm first; None = the server's default, 0 =
                all.
            memory_values: Maximum source positions per head, largest attention first; None = the
                server's default, 0 = all.
            top_neurons: Maximum neurons per MLP, largest activation times norm first; None = the
                server's default, 0 = all.
            bottom_neurons: Maximum neurons per MLP, most negative first; None = the server's
                default, 0 = none.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (scale each vector to length 1 first) or `RAW`.
            node_kinds: Node kinds to send; None = all. Hiding nodes does not change any sum.
            vectors: Send the vectors of the nodes.
            logit_contribution: Send each part's contribution to the target's logit.
            overlap_k: Send each edge's intersection score, computed on this many top tokens.
            checks: Repeat the model's self-check on this request and report it in the summary.
            projections: Project the nodes to the vocabulary, which takes most of the time of a
                trace; None = yes, unless `top_k` and `bottom_k` are 0.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            other: A second token: logit contributions and attributions are those of the difference
                between the target's logit and this token's logit.
            attribution: Send each part's first-order effect on the target's logit at the last
                position of the trace, and the norms of the states' gradients. This takes a backward
                pass.
            gradients: Send the gradients of the states, projected to the vocabulary.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the layers and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the layers received.
        """
        request = trace_request(
            prompt,
            target,
            messages=messages,
            layers=layers,
            positions=positions,
            heads=heads,
            memory_values=memory_values,
            top_neurons=top_neurons,
            bottom_neurons=bottom_neurons,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            node_kinds=node_kinds,
            vectors=vectors,
            logit_contribution=logit_contribution,
            overlap_k=overlap_k,
            checks=checks,
            projections=projections,
            interventions=interventions,
            other=other,
            attribution=attribution,
            gradients=gradients,
            model=model,
            revision=revision,
        )
        return self._stream("Trace", request, timeout, TraceAssembler())

    def estimate_trace(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | None = None,
        memory_values: int | None = None,
        top_neurons: int | None = None,
        bottom_neurons: int | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        node_kinds: Iterable[NodeKind | str] | None = None,
        vectors: bool = False,
        logit_contribution: bool = True,
        overlap_k: int | None = None,
        checks: bool = False,
        projections: bool | None = None,
        interventions: Iterable[Intervention] = (),
        other: TargetLike | None = None,
        attribution: bool = False,
        gradients: bool = False,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `trace` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The token whose rank every projection reports: text of one token, in which a
                leading space counts, or a token id. None = the model's own next token at each
                position.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            layers: Layers to send, from 0; None = all.
            positions: Query positions, negative from the end, or `"all"`; None = the last one.
            heads: Maximum heads per layer, largest norm first; None = the server's default, 0 =
                all.
            memory_values: Maximum source positions per head, largest attention first; None = the
                server's default, 0 = all.
            top_neurons: Maximum neurons per MLP, largest activation times norm first; None = the
                server's default, 0 = all.
            bottom_neurons: Maximum neurons per MLP, most negative first; None = the server's
                default, 0 = none.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (scale each vector to length 1 first) or `RAW`.
            node_kinds: Node kinds to send; None = all. Hiding nodes does not change any sum.
            vectors: Send the vectors of the nodes.
            logit_contribution: Send each part's contribution to the target's logit.
            overlap_k: Send each edge's intersection score, computed on this many top tokens.
            checks: Repeat the model's self-check on this request and report it in the summary.
            projections: Project the nodes to the vocabulary, which takes most of the time of a
                trace; None = yes, unless `top_k` and `bottom_k` are 0.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            other: A second token: logit contributions and attributions are those of the difference
                between the target's logit and this token's logit.
            attribution: Send each part's first-order effect on the target's logit at the last
                position of the trace, and the norms of the states' gradients. This takes a backward
                pass.
            gradients: Send the gradients of the states, projected to the vocabulary.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = trace_request(
            prompt,
            target,
            messages=messages,
            layers=layers,
            positions=positions,
            heads=heads,
            memory_values=memory_values,
            top_neurons=top_neurons,
            bottom_neurons=bottom_neurons,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            node_kinds=node_kinds,
            vectors=vectors,
            logit_contribution=logit_contribution,
            overlap_k=overlap_k,
            checks=checks,
            projections=projections,
            interventions=interventions,
            other=other,
            attribution=attribution,
            gradients=gradients,
            model=model,
            revision=revision,
        )
        return self._estimate(cost_pb2.EstimateCostRequest(trace=request), timeout)

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

    def gradient_lens(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        loss: Loss | None = None,
        matrices: Iterable[MatrixKind | str] | None = None,
        layers: Layers | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        components: int | None = None,
        spectrum: int = 0,
        neurons: int = 0,
        learning_rate: float | None = None,
        subject: SubjectLike | None = None,
        factors: bool = False,
        verify: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Gradient:
        """Compute the gradient of every weight matrix as factors, projected to the vocabulary.

        Source: Backward Lens (Katz et al., 2024).

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The target of the loss `-log p(target | prompt)`: text, in which a leading space
                counts, one token id or several. Pass either `target` or `loss`.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            loss: A `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
            matrices: Kinds of matrices; None = `["FF1", "FF2"]`. For a gated MLP, FF1 means GATE
                and UP.
            layers: Layers to send, from 0; None = all.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (for very small VJPs, as in the paper) or `RAW`.
            components: Maximum factor pairs per matrix, largest first; None = the server's default,
                0 = all, which the dense gradient needs.
            spectrum: Number of singular values and directions per matrix.
            neurons: Number of neurons per matrix, largest change by a descent step first.
            learning_rate: Learning rate of the descent step; None = report only the direction of
                the change.
            subject: The subject of the prompt, as text or as token positions `(start, end)`; adds
                norms and ranks by segment.
            factors: Send the factors, for `matrix.gradient()` and `gradient.save()`.
            verify: Compare each matrix with autograd's dense gradient.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            GradientInterrupted: The stream was interrupted; `partial` has the matrices received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_gradient_lens(
            prompt,
            target,
            messages=messages,
            loss=loss,
            matrices=matrices,
            layers=layers,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            components=components,
            spectrum=spectrum,
            neurons=neurons,
            learning_rate=learning_rate,
            subject=subject,
            factors=factors,
            verify=verify,
            interventions=interventions,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        with stream:
            return stream.result()

    def stream_gradient_lens(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        loss: Loss | None = None,
        matrices: Iterable[MatrixKind | str] | None = None,
        layers: Layers | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        components: int | None = None,
        spectrum: int = 0,
        neurons: int = 0,
        learning_rate: float | None = None,
        subject: SubjectLike | None = None,
        factors: bool = False,
        verify: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EventStream[GradientEvent, Gradient]:
        """Compute `gradient_lens`, and receive each matrix when it is complete, last layer first.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The target of the loss `-log p(target | prompt)`: text, in which a leading space
                counts, one token id or several. Pass either `target` or `loss`.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            loss: A `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
            matrices: Kinds of matrices; None = `["FF1", "FF2"]`. For a gated MLP, FF1 means GATE
                and UP.
            layers: Layers to send, from 0; None = all.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (for very small VJPs, as in the paper) or `RAW`.
            components: Maximum factor pairs per matrix, largest first; None = the server's default,
                0 = all, which the dense gradient needs.
            spectrum: Number of singular values and directions per matrix.
            neurons: Number of neurons per matrix, largest change by a descent step first.
            learning_rate: Learning rate of the descent step; None = report only the direction of
                the change.
            subject: The subject of the prompt, as text or as token positions `(start, end)`; adds
                norms and ranks by segment.
            factors: Send the factors, for `matrix.gradient()` and `gradient.save()`.
            verify: Compare each matrix with autograd's dense gradient.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the matrices and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the matrices received.
        """
        request = gradient_lens_request(
            prompt,
            target,
            messages=messages,
            loss=loss,
            matrices=matrices,
            layers=layers,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            components=components,
            spectrum=spectrum,
            neurons=neurons,
            learning_rate=learning_rate,
            subject=subject,
            factors=factors,
            verify=verify,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return self._stream("GradientLens", request, timeout, GradientAssembler())

    def estimate_gradient_lens(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        loss: Loss | None = None,
        matrices: Iterable[MatrixKind | str] | None = None,
        layers: Layers | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        components: int | None = None,
        spectrum: int = 0,
        neurons: int = 0,
        learning_rate: float | None = None,
        subject: SubjectLike | None = None,
        factors: bool = False,
        verify: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `gradient_lens` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The target of the loss `-log p(target | prompt)`: text, in which a leading space
                counts, one token id or several. Pass either `target` or `loss`.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            loss: A `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
            matrices: Kinds of matrices; None = `["FF1", "FF2"]`. For a gated MLP, FF1 means GATE
                and UP.
            layers: Layers to send, from 0; None = all.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (for very small VJPs, as in the paper) or `RAW`.
            components: Maximum factor pairs per matrix, largest first; None = the server's default,
                0 = all, which the dense gradient needs.
            spectrum: Number of singular values and directions per matrix.
            neurons: Number of neurons per matrix, largest change by a descent step first.
            learning_rate: Learning rate of the descent step; None = report only the direction of
                the change.
            subject: The subject of the prompt, as text or as token positions `(start, end)`; adds
                norms and ranks by segment.
            factors: Send the factors, for `matrix.gradient()` and `gradient.save()`.
            verify: Compare each matrix with autograd's dense gradient.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = gradient_lens_request(
            prompt,
            target,
            messages=messages,
            loss=loss,
            matrices=matrices,
            layers=layers,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            components=components,
            spectrum=spectrum,
            neurons=neurons,
            learning_rate=learning_rate,
            subject=subject,
            factors=factors,
            verify=verify,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return self._estimate(cost_pb2.EstimateCostRequest(gradient_lens=request), timeout)

    def activations(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sites: Site | str | Iterable[Site | str] = Site.BLOCK_OUTPUT,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | Iterable[int] | None = None,
        float32: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Activations:
        """Read tensors of the forward pass, bit for bit those of the model.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            sites: The sites to read, such as `["HEAD_RESULT", "BLOCK_OUTPUT"]`.
            layers: Layers to read, from 0; None = every layer that has the site.
            positions: Positions to read, negative from the end; None or `"all"` = all of them.
            heads: Heads to read at sites with heads, from 0; None = all. KEY and VALUE have
                key-value heads.
            float32: Convert the values to float32. By default they have the model's data type.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            ActivationsInterrupted: The stream was interrupted; `partial` has the tensors received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_activations(
            prompt,
            messages=messages,
            sites=sites,
            layers=layers,
            positions=positions,
            heads=heads,
            float32=float32,
            interventions=interventions,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        with stream:
            return stream.result()

    def stream_activations(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sites: Site | str | Iterable[Site | str] = Site.BLOCK_OUTPUT,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | Iterable[int] | None = None,
        float32: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EventStream[ActivationsEvent, Activations]:
        """Read tensors as in `activations`, and receive each one when it is complete.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            sites: The sites to read, such as `["HEAD_RESULT", "BLOCK_OUTPUT"]`.
            layers: Layers to read, from 0; None = every layer that has the site.
            positions: Positions to read, negative from the end; None or `"all"` = all of them.
            heads: Heads to read at sites with heads, from 0; None = all. KEY and VALUE have
                key-value heads.
            float32: Convert the values to float32. By default they have the model's data type.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the tensors and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the tensors received.
        """
        request = activations_request(
            prompt,
            messages=messages,
            sites=sites,
            layers=layers,
            positions=positions,
            heads=heads,
            float32=float32,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return self._stream("Activations", request, timeout, ActivationsAssembler())

    def estimate_activations(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sites: Site | str | Iterable[Site | str] = Site.BLOCK_OUTPUT,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | Iterable[int] | None = None,
        float32: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `activations` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            sites: The sites to read, such as `["HEAD_RESULT", "BLOCK_OUTPUT"]`.
            layers: Layers to read, from 0; None = every layer that has the site.
            positions: Positions to read, negative from the end; None or `"all"` = all of them.
            heads: Heads to read at sites with heads, from 0; None = all. KEY and VALUE have
                key-value heads.
            float32: Convert the values to float32. By default they have the model's data type.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = activations_request(
            prompt,
            messages=messages,
            sites=sites,
            layers=layers,
            positions=positions,
            heads=heads,
            float32=float32,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return self._estimate(cost_pb2.EstimateCostRequest(activations=request), timeout)

    def intervene(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        target: TargetLike | None = None,
        other: TargetLike | None = None,
        experiments: Iterable[Experiment | Intervention] = (),
        sweep: SweepOver | None = None,
        always: Iterable[Intervention] = (),
        positions: int | Iterable[int] | None = None,
        top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> InterventionEffects:
        """Measure the effects of many experiments, each a changed forward pass, in one request.

        With `resume=True` of the client, an interrupted stream is requested again as a whole, and
        the effects received before are kept.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            target: The token whose probability is reported, as text, in which a leading space
                counts, or as an id; None = the model's own prediction without interventions.
            other: A second token; the difference of both logits is reported.
            experiments: Experiments, or interventions that are experiments by themselves.
            sweep: Further experiments: an intervention split by layer, position, head, neuron or
                source. There may be 16,384 experiments in all.
            always: Interventions of every experiment, before its own, but not of the header.
            positions: Positions where the prediction is read, negative from the end; None = the
                last.
            top_k: Number of tokens to list in each prediction, at most 100; None = 5.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            The predictions without interventions, and the effects by number of the experiment.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            InterveneInterrupted: The stream was interrupted; `partial` has the effects received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_intervene(
            prompt,
            messages=messages,
            target=target,
            other=other,
            experiments=experiments,
            sweep=sweep,
            always=always,
            positions=positions,
            top_k=top_k,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        with stream:
            return stream.result()

    def stream_intervene(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        target: TargetLike | None = None,
        other: TargetLike | None = None,
        experiments: Iterable[Experiment | Intervention] = (),
        sweep: SweepOver | None = None,
        always: Iterable[Intervention] = (),
        positions: int | Iterable[int] | None = None,
        top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EventStream[InterveneEvent, InterventionEffects]:
        """Measure effects as in `intervene`, and receive each one when it is known.

        Experiments that change lower layers run first, so their numbers may not ascend.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            target: The token whose probability is reported, as text, in which a leading space
                counts, or as an id; None = the model's own prediction without interventions.
            other: A second token; the difference of both logits is reported.
            experiments: Experiments, or interventions that are experiments by themselves.
            sweep: Further experiments: an intervention split by layer, position, head, neuron or
                source. There may be 16,384 experiments in all.
            always: Interventions of every experiment, before its own, but not of the header.
            positions: Positions where the prediction is read, negative from the end; None = the
                last.
            top_k: Number of tokens to list in each prediction, at most 100; None = 5.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the effects and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the effects received.
        """
        request = intervene_request(
            prompt,
            messages=messages,
            target=target,
            other=other,
            experiments=experiments,
            sweep=sweep,
            always=always,
            positions=positions,
            top_k=top_k,
            model=model,
            revision=revision,
        )
        return self._stream("Intervene", request, timeout, InterveneAssembler())

    def estimate_intervene(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        target: TargetLike | None = None,
        other: TargetLike | None = None,
        experiments: Iterable[Experiment | Intervention] = (),
        sweep: SweepOver | None = None,
        always: Iterable[Intervention] = (),
        positions: int | Iterable[int] | None = None,
        top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `intervene` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            target: The token whose probability is reported, as text, in which a leading space
                counts, or as an id; None = the model's own prediction without interventions.
            other: A second token; the difference of both logits is reported.
            experiments: Experiments, or interventions that are experiments by themselves.
            sweep: Further experiments: an intervention split by layer, position, head, neuron or
                source. There may be 16,384 experiments in all.
            always: Interventions of every experiment, before its own, but not of the header.
            positions: Positions where the prediction is read, negative from the end; None = the
                last.
            top_k: Number of tokens to list in each prediction, at most 100; None = 5.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = intervene_request(
            prompt,
            messages=messages,
            target=target,
            other=other,
            experiments=experiments,
            sweep=sweep,
            always=always,
            positions=positions,
            top_k=top_k,
            model=model,
            revision=revision,
        )
        return self._estimate(cost_pb2.EstimateCostRequest(intervene=request), timeout)

    def generate(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        sample_top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
        stop: str | Iterable[str] = (),
        top_k: int | None = None,
        layers: Layers | Literal["all"] | None = None,
        layer_top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Generation:
        """Continue a prompt, and report what the model and its layers predicted at each step.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            max_new_tokens: Maximum number of tokens; None = the server's default.
            temperature: Divides the logits before a token is drawn; 0 = take the most likely token.
            sample_top_k: Number of most likely tokens to draw from; 0 = all.
            top_p: Draw from the fewest most likely tokens whose probabilities add up to at least
                this; 0 = all.
            seed: Seed of the draws; the same seed draws the same tokens.
            stop: Text or texts that end the generation; the last token completes the text.
            top_k: Most likely tokens to list at each step; None = the server's default, 0 = none.
            layers: Layers whose output is read at each step, from 0, or `"all"`; None = none.
            layer_top_k: Most likely tokens to list per layer; None = the server's default, 0 =
                none.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            GenerationInterrupted: The stream was interrupted; `partial` has the tokens received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_generate(
            prompt,
            messages=messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sample_top_k=sample_top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            top_k=top_k,
            layers=layers,
            layer_top_k=layer_top_k,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        with stream:
            return stream.result()

    def stream_generate(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        sample_top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
        stop: str | Iterable[str] = (),
        top_k: int | None = None,
        layers: Layers | Literal["all"] | None = None,
        layer_top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EventStream[GenerationEvent, Generation]:
        """Continue a prompt as in `generate`, and receive each token when it is generated.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            max_new_tokens: Maximum number of tokens; None = the server's default.
            temperature: Divides the logits before a token is drawn; 0 = take the most likely token.
            sample_top_k: Number of most likely tokens to draw from; 0 = all.
            top_p: Draw from the fewest most likely tokens whose probabilities add up to at least
                this; 0 = all.
            seed: Seed of the draws; the same seed draws the same tokens.
            stop: Text or texts that end the generation; the last token completes the text.
            top_k: Most likely tokens to list at each step; None = the server's default, 0 = none.
            layers: Layers whose output is read at each step, from 0, or `"all"`; None = none.
            layer_top_k: Most likely tokens to list per layer; None = the server's default, 0 =
                none.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the tokens and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the tokens received.
        """
        request = generate_request(
            prompt,
            messages=messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sample_top_k=sample_top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            top_k=top_k,
            layers=layers,
            layer_top_k=layer_top_k,
            model=model,
            revision=revision,
        )
        assembler = GenerateAssembler(partial(Generation, client=self))
        return self._stream("Generate", request, timeout, assembler)

    def estimate_generate(  # noqa: PLR0913 - by keyword
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        sample_top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
        stop: str | Iterable[str] = (),
        top_k: int | None = None,
        layers: Layers | Literal["all"] | None = None,
        layer_top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `generate` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            max_new_tokens: Maximum number of tokens; None = the server's default.
            temperature: Divides the logits before a token is drawn; 0 = take the most likely token.
            sample_top_k: Number of most likely tokens to draw from; 0 = all.
            top_p: Draw from the fewest most likely tokens whose probabilities add up to at least
                this; 0 = all.
            seed: Seed of the draws; the same seed draws the same tokens.
            stop: Text or texts that end the generation; the last token completes the text.
            top_k: Most likely tokens to list at each step; None = the server's default, 0 = none.
            layers: Layers whose output is read at each step, from 0, or `"all"`; None = none.
            layer_top_k: Most likely tokens to list per layer; None = the server's default, 0 =
                none.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = generate_request(
            prompt,
            messages=messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sample_top_k=sample_top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            top_k=top_k,
            layers=layers,
            layer_top_k=layer_top_k,
            model=model,
            revision=revision,
        )
        return self._estimate(cost_pb2.EstimateCostRequest(generate=request), timeout)

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
        named: dict[str, Any] = {"model": model, "timeout": timeout}
        before = self._prompt_ids(prompt, named)
        said = completion
        if isinstance(said, str):
            said = [found.id for found in self.tokenize(said, literal=True, **named)]
        check_completion(said, token, log_probabilities)
        ids, first, named["revision"] = [*before, *said], len(before) - 1, revision
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
                found = logarithm(one.target().target_probability)
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

    def preview_edit(
        self,
        prompt: Prompt,
        target: TargetLike,
        edit: Edit,
        *,
        probes: Iterable[Probe | str] = (),
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
            model=model,
            revision=revision,
        )
        response = self._send("PreviewEdit", request, timeout)
        return EditPreview.from_message(response)

    def project(
        self,
        vectors: ArrayLike,
        *,
        target: TargetLike | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        top_k: int | None = None,
        bottom_k: int | None = None,
        model: str = "",
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
            layers: Layers to search, from 0; None = all.
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
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = tokenize_request(
            text, messages=messages, special_tokens=special_tokens, literal=literal, model=model
        )
        response = self._send("Tokenize", request, timeout)
        return Tokens(Token.from_message(token) for token in response.tokens)

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

    def close(self) -> None:
        """Close the client; running calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _estimate(
        self, request: cost_pb2.EstimateCostRequest, timeout: float | None
    ) -> CostEstimate:
        return CostEstimate.from_message(self._send("EstimateCost", request, timeout))

    def _send(self, method: str, request: Message, timeout: float | None) -> Any:
        """Make a unary call and return its response."""
        call = ResumableCall(self._connection, method, request, timeout)
        while True:
            try:
                response = self._channel.response(call)
            except grpc.RpcError as error:
                call.failed(error)
                self._channel.sleep(call.pause)
            else:
                self._connection.seen(response)
                return response

    def _stream(
        self,
        method: str,
        request: Message,
        timeout: float | None,
        assembler: Assembler[Any, EventT, ResultT],
    ) -> EventStream[EventT, ResultT]:
        """Start a streaming call."""
        call = ResumableStream(self._connection, method, request, timeout, assembler)
        return EventStream(self._channel, call)

"""The RPCs of IntrospectionService.

All handlers have the same steps: open a `Call`, decode the request, run it, encode the response.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from januslens.v1 import (
    activations_pb2,
    cost_pb2,
    edits_pb2,
    generation_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    lens_pb2,
    models_pb2,
    neurons_pb2,
    server_pb2,
    service_pb2_grpc,
    trace_pb2,
)
from januslens_server.access.quotas import QuotaBook
from januslens_server.errors import CancelCheck, InvalidRequest
from januslens_server.models.registry import Registry
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tokenizer import TokenizerFailed, TooManyTokens, Vocabulary
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.find_neurons import find_neurons
from januslens_server.pipelines.generate import generate
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.intervene import intervene
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.project import project_vectors
from januslens_server.pipelines.resolve import (
    Resolved,
    resolve_activations,
    resolve_find_neurons,
    resolve_generate,
    resolve_gradient_lens,
    resolve_intervene,
    resolve_preview_edit,
    resolve_project,
    resolve_trace,
)
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    ActivationsEvent,
    GeneratedToken,
    GenerationEvent,
    GradientEvent,
    InterveneEvent,
    Token,
    TraceEvent,
)
from januslens_server.rpc import decode
from januslens_server.rpc.admission import Admission, Resolve, ResolvedT
from januslens_server.rpc.call import (
    ADMIN_RPCS,
    RPCS,
    Call,
    Context,
    current_caller,
    result_sizes,
)
from januslens_server.rpc.decode import (
    MAX_TOKENIZED,
    MODELS,
    neurons_list,
    page_size,
    page_start,
    page_token,
)
from januslens_server.rpc.encode import (
    ActivationsEncoder,
    GenerateEncoder,
    GradientLensEncoder,
    InterveneEncoder,
    TraceEncoder,
    estimate_response,
    find_neurons_response,
    get_model_response,
    list_models_response,
    preview_edit_response,
    project_response,
    server_info_response,
    tokenize_response,
)
from januslens_server.rpc.places import ENCODING, PREPARATION, leave_places
from januslens_server.rpc.streaming import DeviceStreams
from januslens_server.rpc.wire import serialized
from januslens_server.specs import loggable

Result = TypeVar("Result")
RequestT = TypeVar("RequestT", bound=Message)
SpecT = TypeVar("SpecT")
Pipeline = Callable[[ResolvedT, CancelCheck], Iterator[Result | None]]


class IntrospectionService(service_pb2_grpc.IntrospectionServiceServicer):
    """The RPCs of `service.proto`, which documents their effects and errors."""

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        device: DeviceStreams,
        *,
        quotas: QuotaBook | None = None,
        log_prompts: bool = False,
    ) -> None:
        """Serve the models of `registry` on `device`, limited by `admission` and `quotas`."""
        self._quotas = quotas or QuotaBook()
        self._log_prompts = log_prompts
        self._registry = registry
        self._admission = admission
        self._device = device

    def _model(self, call: Call, name: str, revision: str = "") -> ResidentModel:
        """Return a model, which stays in memory until the call ends."""
        model = call.hold(self._registry.using(name, revision, current_caller().may_use))
        call.serve(model.name, min(found.level for found in model.view.levels).name)
        return model

    async def ListModels(  # type: ignore[override]  # the stubs expect a message; gRPC also accepts bytes
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> bytes:
        """Return the models that the caller may use, sorted by name, with their states."""
        async with Call("ListModels", context) as call:
            usable = filter(lambda s: current_caller().may_use(s.name), self._registry.statuses())
            statuses = sorted(usable, key=lambda status: status.name)
            start = page_start(request.page_token, MODELS, len(statuses))
            end = start + (request.page_size or len(statuses))
            next_page = page_token(end, MODELS, len(statuses))
            return await _encoded(
                call, partial(list_models_response, statuses[start:end], next_page)
            )

    async def GetModel(  # type: ignore[override]  # as for ListModels
        self, request: models_pb2.GetModelRequest, context: Context
    ) -> bytes:
        """Return the model that the request names, with its state."""
        async with Call("GetModel", context) as call:
            status = self._registry.status(request.model, current_caller().may_use)
            return await _encoded(call, partial(get_model_response, status))

    async def GetServerInfo(  # type: ignore[override]  # as for ListModels
        self, _request: server_pb2.GetServerInfoRequest, context: Context
    ) -> bytes:
        """Return the version, the limits, and the RPCs that the caller may use."""
        async with Call("GetServerInfo", context) as call:
            caller = current_caller()
            rpcs = [*filter(caller.may_call, RPCS), *(ADMIN_RPCS if caller.admin else ())]
            limits = self._admission.configured_limits
            return await _encoded(call, partial(server_info_response, limits, rpcs))

    async def Tokenize(  # type: ignore[override]  # as for ListModels
        self, request: models_pb2.TokenizeRequest, context: Context
    ) -> bytes:
        """Return the tokens of a text or a conversation, without using the device."""
        async with Call("Tokenize", context) as call:
            model = self._model(call, request.model, request.revision)
            if not (request.text or request.HasField("chat")):
                raise InvalidRequest("text", "text is empty; send at least one character")
            tokenize = partial(_tokenized, model.vocabulary, request)
            left = context.time_remaining()
            tokens = await PREPARATION.run_cancellable(model.name, tokenize, left)
            call.note(model=model.name, tokens=len(tokens))
            return await _encoded(call, partial(tokenize_response, tokens, model.provenance))

    async def Project(  # type: ignore[override]  # as for ListModels
        self, request: lens_pb2.ProjectRequest, context: Context
    ) -> bytes:
        """Project the caller's vectors through the model's lens."""
        async with Call("Project", context) as call:
            model = self._model(call, request.model, request.revision)
            resolve = self._resolving(call, model, request, decode.project_spec, resolve_project)
            (table,) = [t async for t in self._run(call, model, resolve, project_vectors)]
            token = model.vocabulary.token
            return await _encoded(call, partial(project_response, table, model.provenance, token))

    async def Trace(  # type: ignore[override]  # the stubs expect a generator; gRPC also accepts writers
        self, request: trace_pb2.TraceRequest, context: Context
    ) -> None:
        """Stream the flow graph of a forward pass, layer by layer."""
        async with Call("Trace", context) as call:
            model, resolve = self._prepared(call, request, decode.trace_spec, resolve_trace)
            encoder = TraceEncoder(call.request_id, model.vocabulary.token)
            results: AsyncGenerator[TraceEvent] = self._run(call, model, resolve, trace)
            await self._device.write(results, encoder.encode, call)

    async def GradientLens(  # type: ignore[override]  # as for Trace
        self, request: gradient_lens_pb2.GradientLensRequest, context: Context
    ) -> None:
        """Stream the factors of a loss's gradients, from the last layer down."""
        async with Call("GradientLens", context) as call:
            model, resolve = self._prepared(
                call, request, decode.gradient_lens_spec, resolve_gradient_lens
            )
            encoder = GradientLensEncoder(call.request_id, model.vocabulary.token)
            results: AsyncGenerator[GradientEvent] = self._run(call, model, resolve, gradient_lens)
            await self._device.write(results, encoder.encode, call)

    async def Activations(  # type: ignore[override]  # as for Trace
        self, request: activations_pb2.ActivationsRequest, context: Context
    ) -> None:
        """Stream tensors of a forward pass, by layer and site."""
        async with Call("Activations", context) as call:
            model, resolve = self._prepared(
                call, request, decode.activations_spec, resolve_activations
            )
            encoder = ActivationsEncoder(call.request_id)
            results: AsyncGenerator[ActivationsEvent] = self._run(call, model, resolve, activations)
            await self._device.write(results, encoder.encode, call)

    async def Generate(  # type: ignore[override]  # as above
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        """Stream the tokens that continue a prompt."""
        async with Call("Generate", context) as call:
            model, resolve = self._prepared(call, request, decode.generate_spec, resolve_generate)
            encoder = GenerateEncoder(call.request_id, model.vocabulary.token)
            results: AsyncGenerator[GenerationEvent] = self._run(call, model, resolve, generate)
            await self._device.write(results, encoder.encode, call)

    async def Intervene(  # type: ignore[override]  # as for Trace
        self, request: intervene_pb2.InterveneRequest, context: Context
    ) -> None:
        """Stream the effects of experiments on the prediction."""
        async with Call("Intervene", context) as call:
            model, resolve = self._prepared(call, request, decode.intervene_spec, resolve_intervene)
            encoder = InterveneEncoder(call.request_id, model.vocabulary.token)
            results: AsyncGenerator[InterveneEvent] = self._run(call, model, resolve, intervene)
            await self._device.write(results, encoder.encode, call)

    async def PreviewEdit(  # type: ignore[override]  # as for ListModels
        self, request: edits_pb2.PreviewEditRequest, context: Context
    ) -> bytes:
        """Return the effects of an edit, which applies to this request only."""
        async with Call("PreviewEdit", context) as call:
            model, resolve = self._prepared(
                call, request, decode.preview_edit_spec, resolve_preview_edit
            )
            previews = [p async for p in self._run(call, model, resolve, preview_edit)]
            token = model.vocabulary.token
            return await _encoded(call, partial(preview_edit_response, previews, token))

    async def FindNeurons(  # type: ignore[override]  # as for ListModels
        self, request: neurons_pb2.FindNeuronsRequest, context: Context
    ) -> bytes:
        """Return one page of the neurons that promote or suppress a token."""
        async with Call("FindNeurons", context) as call:
            model = self._model(call, request.model, request.revision)
            listed = neurons_list(request, model.provenance.revision)
            start = page_start(request.page_token, listed)
            spec = partial(decode.find_neurons_spec, start=start)
            resolve = self._resolving(call, model, request, spec, resolve_find_neurons)
            (found,) = [page async for page in self._run(call, model, resolve, find_neurons)]
            next_page = page_token(start + page_size(request), listed, found.total)
            token = model.vocabulary.token
            return await _encoded(call, partial(find_neurons_response, found, next_page, token))

    async def EstimateCost(  # type: ignore[override]  # as for ListModels
        self, request: cost_pb2.EstimateCostRequest, context: Context
    ) -> bytes:
        """Return the estimated cost of a request, without using the device."""
        async with Call("EstimateCost", context) as call:
            model, resolve = self._estimated(call, request)
            call.note(model=model.name)
            left = context.time_remaining()
            estimate = await self._admission.estimate(model.name, resolve, left)
            exceeded = list(self._admission.exceeded(estimate.cost))
            return await _encoded(call, partial(estimate_response, estimate, exceeded))

    def _estimated(
        self, call: Call, request: cost_pb2.EstimateCostRequest
    ) -> tuple[ResidentModel, Resolve[Resolved]]:
        match request.WhichOneof("request"):
            case "trace":
                return self._prepared(call, request.trace, decode.trace_spec, resolve_trace)
            case "gradient_lens":
                return self._prepared(
                    call, request.gradient_lens, decode.gradient_lens_spec, resolve_gradient_lens
                )
            case "generate":
                return self._prepared(
                    call, request.generate, decode.generate_spec, resolve_generate
                )
            case "activations":
                return self._prepared(
                    call, request.activations, decode.activations_spec, resolve_activations
                )
            case "intervene":
                return self._prepared(
                    call, request.intervene, decode.intervene_spec, resolve_intervene
                )
        raise InvalidRequest(
            "request",
            "no request given; expected trace, gradient_lens, generate, activations or intervene",
        )

    def _prepared(
        self,
        call: Call,
        request: RequestT,
        decode_spec: Callable[[RequestT, int], SpecT],
        resolve: Callable[[ResidentModel, SpecT, CancelCheck], ResolvedT],
    ) -> tuple[ResidentModel, Resolve[ResolvedT]]:
        """Return the model of a request, and a function that decodes and resolves the request."""
        named: Any = request
        model = self._model(call, named.model, named.revision)
        return model, self._resolving(call, model, request, decode_spec, resolve)

    def _resolving(
        self,
        call: Call,
        model: ResidentModel,
        request: RequestT,
        decode_spec: Callable[[RequestT, int], SpecT],
        resolve: Callable[[ResidentModel, SpecT, CancelCheck], ResolvedT],
    ) -> Resolve[ResolvedT]:
        """Return a function for a thread, because decoding 16,384 experiments takes 0.2 s."""

        def resolved(check_cancelled: CancelCheck) -> ResolvedT:
            spec = decode_spec(request, model.view.facts.max_positions)
            if self._log_prompts and hasattr(spec, "prompt"):
                call.note(prompt=loggable(spec.prompt))
            return resolve(model, spec, check_cancelled)

        return resolved

    async def _run(
        self,
        call: Call,
        model: ResidentModel,
        resolve: Resolve[ResolvedT],
        pipeline: Pipeline[ResolvedT, Result],
    ) -> AsyncGenerator[Result]:
        """Resolve and admit a request, run its pipeline on the device, and yield the results."""
        call.note(model=model.name)
        left = call.context.time_remaining()
        estimate = await self._admission.admit(model.name, resolve, left)
        leave_places()
        request, cost = estimate.request, estimate.cost
        self._quotas.charge(current_caller(), cost.seconds, cost.generated)
        queued = call.queued_request(cost)
        generated = 0
        run = partial(pipeline, request)
        try:
            async with self._device.running(run, queued, call) as buffer:
                async for result in buffer.items():
                    call.note(**result_sizes(result))
                    generated += isinstance(result, GeneratedToken)
                    held = [result]
                    del result
                    yield held.pop()  # only the reader keeps the result in memory
        finally:
            self._quotas.settle(
                current_caller(), queued.spent - cost.seconds, generated - cost.generated
            )
        self._admission.learn(request, cost, queued.spent)


async def _encoded(call: Call, encode: Callable[[], Message]) -> bytes:
    """Return the response of a unary call as bytes, made in a thread as those of streams are."""
    message = await ENCODING.run(call.request_id, lambda: serialized(encode()))
    call.sent(len(message))
    return message


def _tokenized(
    vocabulary: Vocabulary, request: models_pb2.TokenizeRequest, check_cancelled: CancelCheck
) -> list[Token]:
    """Tokenize a text or a conversation; runs in a thread, because this may take long."""
    field = "chat" if request.HasField("chat") else "text"
    try:
        if field == "chat":
            decode.refuse_beside(request, ("text", "with_special_tokens", "literal"), field)
            chat = decode.chat(request.chat)
            tokens = vocabulary.encode_chat(
                chat, at_most=MAX_TOKENIZED, check_cancelled=check_cancelled
            )
        else:
            as_prompt = request.with_special_tokens
            encode = vocabulary.encode_prompt if as_prompt else vocabulary.encode_continuation
            tokens = encode(request.text, literal=request.literal, at_most=MAX_TOKENIZED)
    except TooManyTokens as error:
        raise InvalidRequest(
            field, f"too many tokens: expected at most {MAX_TOKENIZED}; split the {field}"
        ) from error
    except TokenizerFailed as error:
        raise InvalidRequest(field, f"the tokenizer failed: {error}; send another text") from error
    return tokens

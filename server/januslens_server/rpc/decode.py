"""Decode requests: convert messages to specs, check field sizes, and handle page tokens."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from enum import IntEnum
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from januslens.v1 import (
    activations_pb2,
    common_pb2,
    edits_pb2,
    generation_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    interventions_pb2,
    lens_pb2,
    neurons_pb2,
    trace_pb2,
)
from januslens_server.errors import InvalidRequest
from januslens_server.results import MatrixKind, NodeKind
from januslens_server.specs import (
    MAX_SUPPRESSED,
    ActivationsSpec,
    Add,
    BlockSources,
    Chat,
    ChatMessage,
    Criterion,
    DescentStep,
    EditGrid,
    ExperimentSpec,
    FindNeuronsSpec,
    ForwardShift,
    GenerateSpec,
    GradientLensSpec,
    HeadSource,
    InterveneSpec,
    InterventionSpec,
    KlDivergence,
    LayerReading,
    LensKind,
    LensSpec,
    LogitDifference,
    LossSpec,
    MeanOver,
    NegativeLogLikelihood,
    Noise,
    Operation,
    PatchFrom,
    PreviewEditSpec,
    Probe,
    ProjectSpec,
    Prompt,
    Sampling,
    Scale,
    Selection,
    SetTo,
    Site,
    Span,
    SweepSpec,
    Target,
    Text,
    TraceSpec,
    Unit,
    Vectors,
    Zero,
)

_TENSOR_TYPES: dict[int, str] = {
    common_pb2.DATA_TYPE_FLOAT32: "<f4",
    common_pb2.DATA_TYPE_FLOAT16: "<f2",
    common_pb2.DATA_TYPE_BFLOAT16: "<u2",
}

Kind = TypeVar("Kind", bound=IntEnum)
Lensed = trace_pb2.TraceRequest | gradient_lens_pb2.GradientLensRequest | lens_pb2.ProjectRequest

# Maximum number of token ids in a list, and how many are converted at a time. A model's context is
# usually smaller: functions that decode a request refuse lists longer than `context`.
MAX_IDS, IDS_AT_ONCE = 2**18, 4096

# Maximum number of tokens per end of a projection, so that a node fits into a message.
MAX_TOKENS = 1000

# Maximum number of vectors of a Project request, and of tokens that they list together, so that the
# response fits into a message.
MAX_VECTORS = 4096
MAX_LISTED = 65_536

# Default and maximum number of neurons on a page. 1000 neurons list 10,000 tokens, which fit into a
# message.
NEURONS = 20
MAX_NEURONS = 1000


def trace_spec(request: trace_pb2.TraceRequest, context: int = MAX_IDS) -> TraceSpec:
    """Decode a Trace request. Raises `InvalidRequest` for invalid fields."""
    return TraceSpec(
        prompt=_input(request.input, context),
        target=_target(request.target, "target", context) if request.HasField("target") else None,
        layers=tuple(request.layers),
        positions=tuple(request.positions),
        all_positions=request.all_positions,
        selection=_selection(request.selection),
        lens=_lens(request),
        node_kinds=frozenset(_enums(NodeKind, request.node_kinds, "node_kinds")),
        include_vectors=request.include_vectors,
        include_logit_contribution=request.include_logit_contribution,
        overlap_k=_tokens(request.overlap_k, "overlap_k"),
        include_checks=request.include_checks,
        include_projections=_projects(request),
        interventions=_interventions(request.interventions, context),
        other=_target(request.other, "other", context) if request.HasField("other") else None,
        include_attribution=request.include_attribution,
        include_gradients=request.include_gradients,
        targets_at=tuple(
            (found.position, _target(found.target, f"targets_at[{i}].target", context))
            for i, found in enumerate(request.targets_at)
        ),
        next_token_targets=request.next_token_targets,
    )


def _projects(request: trace_pb2.TraceRequest) -> bool:
    """Return whether nodes are projected; by default, if anything is requested that needs it."""
    if not request.HasField("include_projections"):
        listed, needed = _lens(request), request.overlap_k or request.include_gradients
        return bool(listed.top_k or listed.bottom_k or needed)
    if request.include_gradients and not request.include_projections:
        raise InvalidRequest(
            "include_gradients",
            "include_gradients projects gradients, but include_projections is false; leave one of "
            "them unset",
        )
    if request.overlap_k and not request.include_projections:
        raise InvalidRequest(
            "overlap_k",
            "overlap_k compares projections, but include_projections is false; leave one of them "
            "unset",
        )
    return request.include_projections


def gradient_lens_spec(
    request: gradient_lens_pb2.GradientLensRequest, context: int = MAX_IDS
) -> GradientLensSpec:
    """Decode a GradientLens request. Raises `InvalidRequest` for invalid fields."""
    defaults = GradientLensSpec("", NegativeLogLikelihood(""))
    components = request.components if request.HasField("components") else defaults.components
    return GradientLensSpec(
        prompt=_input(request.input, context),
        loss=_loss(request, context),
        matrices=tuple(_enums(MatrixKind, request.matrices, "matrices")),
        layers=tuple(request.layers),
        lens=_lens(request),
        components=components,
        spectrum_rank=request.spectrum_rank,
        neurons=request.neurons,
        learning_rate=_learning_rate(request),
        subject=_subject(request.subject) if request.HasField("subject") else None,
        include_factors=request.include_factors,
        verify=request.verify,
        interventions=_interventions(request.interventions, context),
        include_attention_gradients=request.include_attention_gradients,
        modules=tuple(request.modules),
    )


def activations_spec(
    request: activations_pb2.ActivationsRequest, context: int = MAX_IDS
) -> ActivationsSpec:
    """Decode an Activations request. Raises `InvalidRequest` for invalid fields."""
    if request.data_type not in (common_pb2.DATA_TYPE_UNSPECIFIED, common_pb2.DATA_TYPE_FLOAT32):
        raise InvalidRequest(
            "data_type", "unsupported data type; expected FLOAT32, or none for the model's own"
        )
    return ActivationsSpec(
        prompt=_input(request.input, context),
        sites=tuple(_enums(Site, request.sites, "sites")),
        layers=tuple(request.layers),
        positions=tuple(request.positions),
        heads=tuple(request.heads),
        float32=request.data_type == common_pb2.DATA_TYPE_FLOAT32,
        experts=tuple(request.experts),
        interventions=_interventions(request.interventions, context),
    )


# Bytes of one text that ends a generation.
MAX_STOP_BYTES = 1024
# Tokens listed for each layer at each step of a generation: a step must fit into one message.
MAX_READ = 100


def generate_spec(request: generation_pb2.GenerateRequest, context: int = MAX_IDS) -> GenerateSpec:
    """Raise `InvalidRequest` with the field of an invalid value."""
    defaults = GenerateSpec("")
    count = request.max_new_tokens if request.HasField("max_new_tokens") else None
    if count == 0:
        raise InvalidRequest("max_new_tokens", "invalid value 0; expected at least 1")
    for i, text in enumerate(request.stop):
        if not 0 < (length := len(text.encode())) <= MAX_STOP_BYTES:
            raise InvalidRequest(
                f"stop[{i}]",
                f"invalid text of {length} bytes; expected 1 to {MAX_STOP_BYTES} bytes",
            )
    return GenerateSpec(
        prompt=_input(request.input, context),
        max_new_tokens=count or defaults.max_new_tokens,
        sampling=_sampling(request.sampling),
        stop=tuple(request.stop),
        top_k=_tokens(request.top_k, "top_k") if request.HasField("top_k") else defaults.top_k,
        reading=_reading(request.reading) if request.HasField("reading") else None,
        interventions=_interventions(request.interventions, context),
    )


def _sampling(message: generation_pb2.Sampling) -> Sampling:
    if not 0 <= message.temperature < math.inf:
        raise InvalidRequest(
            "sampling.temperature",
            f"invalid value {message.temperature}; expected a finite number of at least 0",
        )
    if not 0 <= message.top_p <= 1:
        raise InvalidRequest(
            "sampling.top_p", f"invalid value {message.top_p}; expected a number from 0 to 1"
        )
    return Sampling(message.temperature, message.top_k, message.top_p, message.seed)


def _reading(message: generation_pb2.LayerReading) -> LayerReading:
    top_k = message.top_k if message.HasField("top_k") else LayerReading().top_k
    if top_k > MAX_READ:
        raise InvalidRequest(
            "reading.top_k", f"too many tokens: expected at most {MAX_READ}, got {top_k}"
        )
    return LayerReading(tuple(message.layers), top_k)


def intervene_spec(
    request: intervene_pb2.InterveneRequest, context: int = MAX_IDS
) -> InterveneSpec:
    """Decode an Intervene request. Raises `InvalidRequest` for invalid fields."""
    top_k = request.top_k if request.HasField("top_k") else 5
    if top_k > MAX_READ:
        raise InvalidRequest("top_k", f"too many tokens: expected at most {MAX_READ}, got {top_k}")
    experiments = (
        ExperimentSpec(
            message.label,
            _interventions(message.interventions, context, f"experiments[{i}].interventions"),
        )
        for i, message in enumerate(request.experiments)
    )
    return InterveneSpec(
        prompt=_input(request.input, context),
        target=_target(request.target, "target", context) if request.HasField("target") else None,
        other=_target(request.other, "other", context) if request.HasField("other") else None,
        experiments=tuple(experiments),
        sweep=_sweep(request.sweep, context) if request.HasField("sweep") else None,
        always=_interventions(request.always, context, "always"),
        positions=tuple(request.positions),
        top_k=top_k,
    )


def _sweep(message: intervene_pb2.Sweep, context: int) -> SweepSpec:
    return SweepSpec(
        template=_intervention(message.template, "sweep.template", context),
        by_layer=message.by_layer,
        by_position=message.by_position,
        by_unit=message.by_head or message.by_neuron,
        by_source=message.by_source,
        layer_window=message.layer_window if message.HasField("layer_window") else 1,
    )


def _interventions(
    messages: Iterable[interventions_pb2.Intervention], context: int, field: str = "interventions"
) -> tuple[InterventionSpec, ...]:
    return tuple(
        _intervention(message, f"{field}[{i}]", context) for i, message in enumerate(messages)
    )


def _intervention(
    message: interventions_pb2.Intervention, field: str, context: int
) -> InterventionSpec:
    return InterventionSpec(
        site=_enum(Site, message.site, f"{field}.site"),
        operation=_operation(message, field, context),
        layers=tuple(message.layers),
        positions=tuple(message.positions),
        heads=tuple(message.heads),
        neurons=tuple(message.neurons),
        sources=tuple(message.source_positions),
        experts=tuple(message.experts),
    )


def _operation(message: interventions_pb2.Intervention, field: str, context: int) -> Operation:
    which = message.WhichOneof("operation")
    operation: Operation
    match which:
        case "zero" | "block":
            if not getattr(message, which):
                raise InvalidRequest(f"{field}.{which}", "invalid value false; expected true")
            operation = Zero() if which == "zero" else BlockSources()
        case "scale":
            operation = Scale(_finite(message.scale, f"{field}.scale"))
        case "set":
            operation = SetTo(_values(message.set, f"{field}.set"))
        case "add":
            added = message.add
            coefficient = added.coefficient if added.HasField("coefficient") else 1.0
            operation = Add(
                _values(added.vector, f"{field}.add.vector"),
                _finite(coefficient, f"{field}.add.coefficient"),
            )
        case "patch":
            prompt = _input(message.patch.input, context, f"{field}.patch.input")
            operation = PatchFrom(prompt, tuple(message.patch.positions))
        case "mean_over":
            inputs = f"{field}.mean_over.inputs"
            prompts = enumerate(message.mean_over.inputs)
            operation = MeanOver(
                tuple(_input(prompt, context, f"{inputs}[{i}]") for i, prompt in prompts)
            )
        case "noise":
            deviation = f"{field}.noise.standard_deviation"
            if _finite(message.noise.standard_deviation, deviation) < 0:
                raise InvalidRequest(deviation, "negative value; expected at least 0")
            operation = Noise(message.noise.standard_deviation, message.noise.seed)
        case _:
            raise InvalidRequest(
                field,
                "no operation given; expected zero, scale, set, add, patch, mean_over, noise or "
                "block",
            )
    return operation


def _finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        raise InvalidRequest(field, f"invalid value {value}; expected a finite number")
    return value


def _values(tensor: common_pb2.Tensor, field: str) -> Vectors:
    """Decode a tensor of any shape to float32. Raises `InvalidRequest` for infinity and NaN."""
    values = _tensor(tensor, field)
    if not np.isfinite(values).all():
        raise InvalidRequest(f"{field}.data", "infinite or NaN value; expected finite numbers")
    return values


def project_spec(request: lens_pb2.ProjectRequest, context: int = MAX_IDS) -> ProjectSpec:
    """Decode a Project request. Raises `InvalidRequest` for invalid fields."""
    vectors, lens = _matrix(request.vectors), _lens(request)
    listed = len(vectors) * (lens.top_k + lens.bottom_k)
    if listed > MAX_LISTED:
        raise InvalidRequest(
            "vectors",
            f"too many tokens listed: expected at most {MAX_LISTED} over all vectors, got {listed}",
        )
    return ProjectSpec(
        vectors=vectors,
        lens=lens,
        target=_target(request.target, "target", context) if request.HasField("target") else None,
    )


def _matrix(tensor: common_pb2.Tensor) -> Vectors:
    """Decode a tensor `[n, d_model]` or `[d_model]` to float32 `[n, d_model]`."""
    shape = tuple(tensor.shape)
    if tensor.data_type in _TENSOR_TYPES and (len(shape) not in {1, 2} or min(shape) < 1):
        raise InvalidRequest("vectors.shape", f"invalid shape {list(shape)}; expected [n, d_model]")
    values = _tensor(tensor, "vectors")
    values = values.reshape(-1, values.shape[-1])
    if len(values) > MAX_VECTORS:
        raise InvalidRequest(
            "vectors", f"too many vectors: expected at most {MAX_VECTORS}, got {len(values)}"
        )
    return values


def _tensor(tensor: common_pb2.Tensor, field: str) -> Vectors:
    """Decode a tensor to float32."""
    kind = _TENSOR_TYPES.get(tensor.data_type)
    if kind is None:
        raise InvalidRequest(
            f"{field}.data_type", "unsupported data type; expected FLOAT32, FLOAT16 or BFLOAT16"
        )
    shape = tuple(tensor.shape)
    if min(shape, default=1) < 1:
        raise InvalidRequest(
            f"{field}.shape", f"invalid shape {list(shape)}; expected sizes above 0"
        )
    size = math.prod(shape) * np.dtype(kind).itemsize
    if len(tensor.data) != size:
        raise InvalidRequest(
            f"{field}.data",
            f"wrong length: expected {size} bytes for this shape, got {len(tensor.data)}",
        )
    values = np.frombuffer(tensor.data, dtype=kind).reshape(shape)
    if tensor.data_type == common_pb2.DATA_TYPE_BFLOAT16:
        values = (values.astype("<u4") << 16).view("<f4")  # bfloat16 is the upper half of float32
    return values.astype(np.float32)


def preview_edit_spec(
    request: edits_pb2.PreviewEditRequest, context: int = MAX_IDS
) -> PreviewEditSpec:
    """Decode a PreviewEdit request. Raises `InvalidRequest` for invalid fields."""
    return PreviewEditSpec(
        prompt=_input(request.input, context),
        target=_target(request.target, "target", context),
        edit=_edit(request),
        probes=tuple(
            _probe(probe, f"probes[{i}]", context) for i, probe in enumerate(request.probes)
        ),
        interventions=_interventions(request.interventions, context),
        grid=_grid(request) if request.HasField("grid") else None,
    )


def find_neurons_spec(
    request: neurons_pb2.FindNeuronsRequest, context: int = MAX_IDS, start: int = 0
) -> FindNeuronsSpec:
    """Decode a FindNeurons request; `start` is the number of the page's first neuron.

    Raises `InvalidRequest` for invalid fields.
    """
    return FindNeuronsSpec(
        token=_target(request.token, "token", context),
        suppressed=request.suppressed,
        layers=tuple(request.layers),
        start=start,
        count=page_size(request),
    )


def page_size(request: neurons_pb2.FindNeuronsRequest) -> int:
    """Return the maximum number of neurons on the requested page."""
    return min(request.page_size or NEURONS, MAX_NEURONS)


def _edit(request: edits_pb2.PreviewEditRequest) -> DescentStep | ForwardShift:
    which, in_grid = request.WhichOneof("edit"), request.HasField("grid")
    if which == "descent":
        step, rate = request.descent, request.descent.learning_rate
        return DescentStep(
            matrices=tuple(_enums(MatrixKind, step.matrices, "descent.matrices")),
            layers=tuple(step.layers),
            learning_rate=rate if in_grid else _strength(rate, "descent.learning_rate"),
        )
    if which == "shift":
        shift, eta = request.shift, request.shift.eta
        eta = eta if in_grid else _strength(eta, "shift.eta")
        return ForwardShift(shift.layer, eta, shift.include_gradient_cosine)
    raise InvalidRequest("edit", "no edit given; expected descent or shift")


def _grid(request: edits_pb2.PreviewEditRequest) -> EditGrid:
    for edit, names in (
        (request.descent, ("layers", "learning_rate")),
        (request.shift, ("layer", "eta")),
    ):
        for name in names:
            if getattr(edit, name):
                raise InvalidRequest(
                    f"{request.WhichOneof('edit')}.{name}",
                    f"{name} and grid are both set; set only one of them",
                )
    strengths = request.grid.strengths
    if not strengths:
        raise InvalidRequest("grid.strengths", "no strengths given; send at least one")
    return EditGrid(
        tuple(request.grid.layers),
        tuple(_strength(value, f"grid.strengths[{i}]") for i, value in enumerate(strengths)),
    )


def _strength(value: float, field: str) -> float:
    if not math.isfinite(value) or value == 0:
        raise InvalidRequest(field, f"invalid value {value}; expected a finite number other than 0")
    return value


def _probe(message: edits_pb2.Probe, field: str, context: int) -> Probe:
    target = None
    if message.HasField("target"):
        target = _target(message.target, f"{field}.target", context)
    return Probe(message.label, _input(message.input, context, f"{field}.input"), target)


def _input(message: common_pb2.Input, context: int, field: str = "input") -> Prompt:
    which = message.WhichOneof("input")
    if which == "chat":
        refuse_beside(message, ("add_special_tokens", "literal"), which, f"{field}.")
        return chat(message.chat)
    if which is None:
        raise InvalidRequest(field, "no prompt given; expected prompt, token_ids or chat")
    if which != "token_ids":
        without = message.HasField("add_special_tokens") and not message.add_special_tokens
        if without or message.literal:
            return Text(message.prompt, not without, message.literal)
        return message.prompt
    refuse_beside(message, ("add_special_tokens", "literal"), which, f"{field}.")
    return _ids(message.token_ids, f"{field}.token_ids", context)


def _target(message: common_pb2.Target, field: str, context: int) -> Target:
    which = message.WhichOneof("target")
    if which is None:
        raise InvalidRequest(field, "no target given; expected text or token_ids")
    if which == "text":
        return Text(message.text, literal=True) if message.literal else message.text
    refuse_beside(message, ("literal",), which, f"{field}.")
    return _ids(message.token_ids, f"{field}.token_ids", context)


def _ids(message: common_pb2.TokenIds, field: str, limit: int) -> tuple[int, ...]:
    """Return token ids as integers, unless there are more than `limit`.

    The conversion of 250,000 ids takes 60 ms, and Python's lock is held during each part of it.
    """
    if (count := len(message.ids)) > limit:
        raise InvalidRequest(
            f"{field}.ids", f"too many tokens: expected at most {limit}, got {count}; send fewer"
        )
    starts = range(0, len(message.ids), IDS_AT_ONCE)
    return tuple(chain.from_iterable(message.ids[at : at + IDS_AT_ONCE] for at in starts))


def chat(message: common_pb2.Chat) -> Chat:
    """Return the conversation that a message holds."""
    messages = tuple(ChatMessage(said.role, said.content) for said in message.messages)
    return Chat(messages, message.continue_final_message)


def refuse_beside(message: Message, names: Iterable[str], which: str, path: str = "") -> None:
    """Refuse options that apply to texts only; `which` is what the message has instead.

    Raises `InvalidRequest` for the first of `names` that is set.
    """
    for name in names:
        if getattr(message, name):
            expected = f"{name} applies to text only; leave it unset beside {which}"
            raise InvalidRequest(f"{path}{name}", expected)


def _lens(request: Lensed) -> LensSpec:
    defaults = LensSpec()
    top_k = request.top_k if request.HasField("top_k") else defaults.top_k
    bottom_k = request.bottom_k if request.HasField("bottom_k") else defaults.bottom_k
    return LensSpec(
        top_k=_tokens(top_k, "top_k"),
        bottom_k=_tokens(bottom_k, "bottom_k"),
        kind=_enum(LensKind, request.lens, "lens") if request.lens else defaults.kind,
    )


def _learning_rate(request: gradient_lens_pb2.GradientLensRequest) -> float | None:
    if not request.HasField("learning_rate"):
        return None
    if not math.isfinite(request.learning_rate):
        expected = f"invalid value {request.learning_rate}; expected a finite number"
        raise InvalidRequest("learning_rate", expected)
    return request.learning_rate


def _tokens(count: int, field: str) -> int:
    if count > MAX_TOKENS:
        raise InvalidRequest(field, f"too many tokens: expected at most {MAX_TOKENS}, got {count}")
    return count


def _selection(message: trace_pb2.Selection) -> Selection:
    counts = {descriptor.name: value for descriptor, value in message.ListFields()}
    by = _enum(Criterion, counts.pop("by", Criterion.VISIT), "selection.by")
    heads, neurons = (
        tuple(map(_unit, counts.pop(name, ()))) for name in ("only_heads", "only_neurons")
    )
    sources = tuple(
        HeadSource(each.layer, each.head, each.position) for each in counts.pop("only_sources", ())
    )
    return Selection(**counts, by=by, only_heads=heads, only_neurons=neurons, only_sources=sources)


def _unit(message: trace_pb2.Unit) -> Unit:
    expert = message.expert if message.HasField("expert") else None
    return Unit(message.layer, message.number, expert)


def _loss(request: gradient_lens_pb2.GradientLensRequest, context: int) -> LossSpec:
    which = request.WhichOneof("loss")
    if which == "nll":
        return NegativeLogLikelihood(_target(request.nll.target, "nll.target", context))
    if which == "logit_difference":
        return LogitDifference(
            preferred=_target(
                request.logit_difference.preferred, "logit_difference.preferred", context
            ),
            other=_target(request.logit_difference.other, "logit_difference.other", context),
        )
    if which == "kl":
        tokens = enumerate(request.kl.tokens)
        return KlDivergence(
            _ids(request.kl.suppressed, "kl.suppressed", MAX_SUPPRESSED),
            tuple(_target(token, f"kl.tokens[{i}]", context) for i, token in tokens),
        )
    raise InvalidRequest("loss", "no loss given; expected nll, logit_difference or kl")


def _subject(message: gradient_lens_pb2.Subject) -> str | Span:
    which = message.WhichOneof("subject")
    if which is None:
        raise InvalidRequest("subject", "no subject given; expected text or span")
    return message.text if which == "text" else Span(message.span.start, message.span.end)


def _enums(kind: type[Kind], values: Iterable[int], field: str) -> list[Kind]:
    return [_enum(kind, value, f"{field}[{i}]") for i, value in enumerate(values)]


def _enum(kind: type[Kind], value: int, field: str) -> Kind:
    try:
        return kind(value)
    except ValueError as error:
        names = ", ".join(kind.__members__)
        raise InvalidRequest(field, f"unknown value {value}; expected one of {names}") from error


KIB, MIB = 2**10, 2**20

# Maximum sizes of fields: bytes of strings (in UTF-8) and bytes fields, entries of repeated fields.
# A test (tests/contract/test_bounds.py) fails for fields that are missing here. docs/api.md has the
# same table.
BOUNDS: dict[str, int] = {
    "ActivationsRequest.experts": 4 * KIB,
    "ActivationsRequest.heads": 4 * KIB,
    "ActivationsRequest.interventions": 256,
    "ActivationsRequest.layers": 4 * KIB,
    "ActivationsRequest.model": 256,
    "ActivationsRequest.positions": 64 * KIB,
    "ActivationsRequest.revision": 256,
    "ActivationsRequest.sites": 64,
    "Chat.messages": 1024,
    "ChatMessage.content": MIB,
    "ChatMessage.role": 64,
    "DescentStep.layers": 4 * KIB,
    "DescentStep.matrices": 64,
    "EditGrid.layers": 4 * KIB,
    "EditGrid.strengths": 64,
    "FindNeuronsRequest.layers": 4 * KIB,
    "FindNeuronsRequest.model": 256,
    "FindNeuronsRequest.page_token": 256,
    "FindNeuronsRequest.revision": 256,
    "GenerateRequest.interventions": 256,
    "GenerateRequest.model": 256,
    "GenerateRequest.revision": 256,
    "GenerateRequest.stop": 16,
    "GetModelRequest.model": 256,
    "GradientLensRequest.interventions": 256,
    "GradientLensRequest.layers": 4 * KIB,
    "GradientLensRequest.matrices": 64,
    "GradientLensRequest.modules": 64,
    "GradientLensRequest.model": 256,
    "GradientLensRequest.revision": 256,
    "Input.prompt": MIB,
    "KlDivergence.tokens": 256,
    "LayerReading.layers": 4 * KIB,
    "Experiment.interventions": 256,
    "Experiment.label": 4 * KIB,
    "InterveneRequest.always": 256,
    "InterveneRequest.experiments": 16 * KIB,
    "InterveneRequest.model": 256,
    "InterveneRequest.positions": 64 * KIB,
    "InterveneRequest.revision": 256,
    "Intervention.experts": 4 * KIB,
    "Intervention.heads": 4 * KIB,
    "Intervention.layers": 4 * KIB,
    "Intervention.neurons": 64 * KIB,
    "Intervention.positions": 64 * KIB,
    "Intervention.source_positions": 64 * KIB,
    "ListModelsRequest.page_token": 256,
    "LoadModelRequest.model": 256,
    "LoadModelRequest.revision": 256,
    "LoadModelRequest.source": 4 * KIB,
    "MeanOver.inputs": 64,
    "Patch.positions": 64 * KIB,
    "PreviewEditRequest.model": 256,
    "PreviewEditRequest.interventions": 256,
    "PreviewEditRequest.probes": 64,
    "PreviewEditRequest.revision": 256,
    "Probe.label": 4 * KIB,
    "ProjectRequest.model": 256,
    "ProjectRequest.revision": 256,
    "Subject.text": 64 * KIB,
    "Target.text": 64 * KIB,
    "Tensor.data": 4 * MIB,
    "Tensor.shape": 8,
    "TokenIds.ids": MAX_IDS,
    "TokenizeRequest.model": 256,
    "TokenizeRequest.revision": 256,
    "TokenizeRequest.text": 128 * KIB,
    "TraceRequest.interventions": 256,
    "Selection.only_heads": 4 * KIB,
    "Selection.only_neurons": 4 * KIB,
    "Selection.only_sources": 4 * KIB,
    "TraceRequest.layers": 4 * KIB,
    "TraceRequest.model": 256,
    "TraceRequest.node_kinds": 64,
    "TraceRequest.positions": 64 * KIB,
    "TraceRequest.revision": 256,
    "TraceRequest.targets_at": 64 * KIB,
    "UnloadModelRequest.model": 256,
}

# Maximum number of tokens of a Tokenize. The response is serialised in the event loop, which must
# not delay other calls for long.
MAX_TOKENIZED = 32 * KIB


# Maximum number of fields and messages in messages that contain lists of messages: six for each of
# 16,384 experiments. Lists of numbers count once, unless a client encodes each number separately.
MAX_FIELDS = 100_000
# Shorter requests are not counted: they have a few thousand fields at most.
COUNTED_BYTES = 8 * KIB


def check_counts(kind: Descriptor, data: bytes) -> None:
    """Raise `InvalidRequest` if an encoded request has too many fields, before it is parsed.

    4 MiB can encode two million empty messages, which take 128 MiB and 0.1 s to parse.
    """
    if len(data) < COUNTED_BYTES:
        return
    fields = 0
    unread = [(kind, 0, len(data))]
    while unread:
        current, at, end = unread.pop()
        while at < end:
            fields += 1
            if fields > MAX_FIELDS:
                raise InvalidRequest(
                    "request", f"too many fields; expected at most {MAX_FIELDS}, packed if numbers"
                )
            tag, at = _varint(data, at)
            wire_type = tag & 7
            if wire_type == _VARINT:
                _, at = _varint(data, at)
            elif wire_type == _BYTES:
                size, at = _varint(data, at)
                field = current.fields_by_number.get(tag >> 3)
                inner = None if field is None else field.message_type
                if size and inner is not None and _may_repeat_messages(inner):
                    unread.append((inner, at, min(at + size, end)))
                at += size
            else:
                at += _FIXED.get(wire_type, 0)  # groups are unknown fields


_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a variable-length number; returns it and where it ends. Parsing refuses invalid ones."""
    value = shift = 0
    for byte in data[at : at + 10]:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            break
    return value, at


@cache
def _may_repeat_messages(kind: Descriptor) -> bool:
    """Whether a message has a list of messages at any depth."""
    inner = [field for field in kind.fields if field.message_type is not None]
    return any(f.is_repeated or _may_repeat_messages(f.message_type) for f in inner)


def check_bounds(request: Message, path: str = "") -> None:
    """Raise `InvalidRequest` for the first field that is longer than its bound."""
    for field, value in request.ListFields():
        where = f"{path}{field.name}"
        limit = BOUNDS.get(f"{request.DESCRIPTOR.name}.{field.name}")
        if limit is not None:
            _check(field, value, limit, where)
        for i, inner in enumerate(_messages(field, value)):
            check_bounds(inner, f"{where}[{i}]." if field.is_repeated else f"{where}.")


def _check(field: Any, value: Any, limit: int, where: str) -> None:
    if field.is_repeated:
        length, unit = len(value), "entries"
    else:
        length, unit = len(value.encode() if isinstance(value, str) else value), "bytes"
    if length > limit:
        raise InvalidRequest(where, f"too long: expected at most {limit} {unit}, got {length}")


def _messages(field: Any, value: Any) -> Iterable[Message]:
    if field.message_type is None:
        return ()
    return value if field.is_repeated else (value,)


# Name of the list of models, in page tokens.
MODELS = "models"

_TOKEN = re.compile(r"([1-9][0-9]{0,8})\.(\w+)", re.ASCII)


def neurons_list(request: neurons_pb2.FindNeuronsRequest, revision: str) -> str:
    """Return a hash that identifies a list of neurons, whatever the size of its pages."""
    asked = neurons_pb2.FindNeuronsRequest(
        token=request.token, suppressed=request.suppressed, layers=request.layers
    )
    text = asked.SerializeToString(deterministic=True) + revision.encode()
    return hashlib.sha256(text).hexdigest()[:16]


def page_token(start: int, listed: str, total: int) -> str:
    """Return the token of the page that starts at entry `start`; empty if there is none."""
    return f"{start}.{listed}" if start < total else ""


def page_start(token: str, listed: str, total: int | None = None) -> int:
    """Return the number of the first entry of a page.

    Raises `InvalidRequest` for a token that was not issued for this list, or is not below `total`.
    """
    if not token:
        return 0
    issued = _TOKEN.fullmatch(token)
    start = int(issued[1]) if issued and issued[2] == listed else None
    if start is None or (total is not None and start >= total):
        raise InvalidRequest(
            "page_token",
            "page_token was not issued for this list; request the first page without one",
        )
    return start

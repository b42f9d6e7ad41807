"""Resolve a decoded request against a model, once, for both its estimate and its run.

Each record has the model that it was resolved for, which therefore stays in memory until the
request ends. Resolving does not use the device, so it happens before the request is queued.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod

from januslens_server.errors import (
    CancelCheck,
    IndependentFields,
    InvalidRequest,
    never_cancelled,
)
from januslens_server.lens.backward_lens import Segment
from januslens_server.models.interventions import Intervention
from januslens_server.models.resident import ResidentModel
from januslens_server.models.sites import (
    AFTER_LAYERS,
    BEFORE_LAYERS,
    SITES_WITH_HEADS,
    SiteKey,
    site_shape,
    sites_of_layer,
)
from januslens_server.pipelines.edits import ResolvedEdit, read_edits
from januslens_server.pipelines.experiments import Experiment, read_experiments
from januslens_server.pipelines.inputs import (
    Objective,
    Part,
    check_node_kinds,
    gradient_matrices,
    layers_with_parts,
    read_experts,
    read_heads,
    read_layers,
    read_objective,
    read_positions,
    read_prompt,
    read_segments,
    read_selection,
    read_single_target,
    read_sites_of,
    read_sources,
    read_target,
)
from januslens_server.pipelines.interventions import OtherPrompts, read_interventions
from januslens_server.results import LayerLevel, MatrixKind, Token
from januslens_server.specs import (
    ActivationsSpec,
    FindNeuronsSpec,
    ForwardShift,
    GenerateSpec,
    GradientLensSpec,
    InterveneSpec,
    PreviewEditSpec,
    ProjectSpec,
    Site,
    TraceSpec,
)


@dataclass(frozen=True)
class ResolvedTrace:
    """A Trace with its tokens, layers, positions, targets and second token.

    `targets` has one token for each position; None means the model's own prediction.
    `seconds` is the time that resolving took, reported as the stage "tokenize".
    """

    model: ResidentModel
    spec: TraceSpec
    tokens: list[Token]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int | None, ...]
    other: int | None
    interventions: tuple[Intervention, ...]
    seconds: float


@dataclass(frozen=True)
class ResolvedGradientLens:
    """A GradientLens with its tokens, loss, matrices and segments.

    `matrices` are kinds, or names of modules. They and `attention_layers`, the layers whose
    attention is sent, start with the last layer. `limited_layers` are those without all parts, and
    `without_attention` those whose attention is missing.
    `seconds` is the time that resolving took, reported as the stage "tokenize".
    """

    model: ResidentModel
    spec: GradientLensSpec
    objective: Objective
    matrices: list[tuple[int, MatrixKind | str]]
    skipped: tuple[MatrixKind, ...]
    limited_layers: tuple[LayerLevel, ...]
    without_attention: tuple[int, ...]
    segments: dict[Segment, list[int]]
    interventions: tuple[Intervention, ...]
    attention_layers: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class ResolvedProject:
    """A Project with its target token, if any; its vectors have the model's width."""

    model: ResidentModel
    spec: ProjectSpec
    target: int | None


@dataclass(frozen=True)
class Watched:
    """A prompt with a target token, to compare before and after an edit, under interventions."""

    label: str
    ids: tuple[int, ...]
    target: int
    interventions: tuple[Intervention, ...] = ()


@dataclass(frozen=True)
class ResolvedPreviewEdit:
    """A PreviewEdit with its prompts, targets and edits.

    `watched` starts with the edit's own prompt. `targets` are all tokens of the edit's target.
    `interventions` are those of the pass that the edit is computed from, whose tokens are the
    prompt and all but the last of the `targets`.
    """

    model: ResidentModel
    spec: PreviewEditSpec
    targets: tuple[int, ...]
    watched: list[Watched]
    edits: Sequence[ResolvedEdit]
    interventions: tuple[Intervention, ...] = ()

    @property
    def matrices(self) -> list[tuple[int, MatrixKind]]:
        """The matrices that at least one of the edits changes."""
        return list(dict.fromkeys(key for edit in self.edits for key in edit.matrices))


@dataclass(frozen=True)
class ResolvedFindNeurons:
    """A FindNeurons with its token and layers.

    `limited_layers` are those of the request whose neurons are unknown.
    """

    model: ResidentModel
    spec: FindNeuronsSpec
    token: int
    layers: tuple[int, ...]
    limited_layers: tuple[LayerLevel, ...]


@dataclass(frozen=True)
class ResolvedActivations:
    """An Activations request with its tokens, positions, heads and experts.

    `keys` are the sites of layers to read, in the order of the pass; `sizes` has the number of
    values that each sends per position. `limited_layers` lack a requested site.
    `seconds` is as in `ResolvedTrace`.
    """

    model: ResidentModel
    spec: ActivationsSpec
    tokens: list[Token]
    positions: tuple[int, ...]
    keys: tuple[SiteKey, ...]
    sizes: Mapping[SiteKey, int]
    heads: tuple[int, ...]
    experts: tuple[int, ...]
    limited_layers: tuple[LayerLevel, ...]
    interventions: tuple[Intervention, ...]
    seconds: float


@dataclass(frozen=True)
class ResolvedGenerate:
    """A Generate with resolved tokens and layers.

    At most `max_new_tokens` are generated, which the model's context has positions for. `seconds`
    is the time that resolving took.
    """

    model: ResidentModel
    spec: GenerateSpec
    tokens: list[Token]
    layers: tuple[int, ...]
    max_new_tokens: int
    interventions: tuple[Intervention, ...]
    seconds: float


@dataclass(frozen=True)
class ResolvedIntervene:
    """An Intervene with its tokens, positions, targets and experiments.

    At most `at_once` experiments run as a batch. `seconds` is as in `ResolvedTrace`.
    """

    model: ResidentModel
    spec: InterveneSpec
    tokens: list[Token]
    positions: tuple[int, ...]
    target: int | None
    other: int | None
    always: tuple[Intervention, ...]
    experiments: list[Experiment]
    at_once: int
    seconds: float

    @cached_property
    def first_numbers(self) -> list[int]:
        """Number of each experiment's first intervention, counted after those of `always`."""
        counts = [len(experiment.interventions) for experiment in self.experiments]
        return list(accumulate(counts, initial=len(self.always)))[:-1]


Resolved = (
    ResolvedTrace
    | ResolvedIntervene
    | ResolvedActivations
    | ResolvedGradientLens
    | ResolvedProject
    | ResolvedPreviewEdit
    | ResolvedFindNeurons
    | ResolvedGenerate
)


def resolve_trace(
    model: ResidentModel, spec: TraceSpec, check_cancelled: CancelCheck = never_cancelled
) -> ResolvedTrace:
    """Resolve a Trace.

    Raises `InvalidRequest` for an invalid prompt, layer, position or target.
    """
    started = time.perf_counter()
    with IndependentFields() as fields:
        tokens = fields.read(read_prompt, model, spec.prompt, check_cancelled=check_cancelled)
        selection = fields.read(read_selection, model, spec.selection)
        fields.read(read_layers, model, spec.layers)
        target, other = _single_targets(model, spec, fields)
    spec = replace(spec, selection=selection)
    layers = _traced_layers(model, spec)
    others = OtherPrompts(model, check_cancelled)
    ids = [token.id for token in tokens]
    with IndependentFields() as fields:
        fields.read(check_node_kinds, model, spec.node_kinds, layers, named=bool(spec.layers))
        positions = fields.read(read_positions, spec.positions, spec.all_positions, len(tokens))
        selection = fields.read(read_sources, selection, len(tokens))
        targets = fields.read(_targets, model, spec, ids, target)
        interventions = fields.read(
            read_interventions, model, spec.interventions, len(tokens), others=others
        )
    return ResolvedTrace(
        model=model,
        spec=replace(spec, selection=selection),
        tokens=tokens,
        layers=layers,
        positions=positions,
        targets=tuple(targets[position] for position in positions),
        other=other,
        interventions=interventions,
        seconds=time.perf_counter() - started,
    )


def _traced_layers(model: ResidentModel, spec: TraceSpec) -> tuple[int, ...]:
    """Return the layers of a trace, by default those of the heads and neurons that it names."""
    selection = spec.selection
    named = {unit.layer for unit in selection.only_neurons}
    named.update(layer for layer, _ in selection.named_heads)
    return read_layers(model, spec.layers or tuple(named))


def _targets(
    model: ResidentModel,
    spec: TraceSpec,
    ids: Sequence[int],
    target: int | None,
) -> dict[int, int | None]:
    """Return the target of each position of the prompt; None means the model's own prediction."""
    found: dict[int, int | None] = dict.fromkeys(range(len(ids)), target)
    if spec.next_token_targets:
        found |= enumerate(ids[1:])
    asked: set[int] = set()
    for i, (position, token) in enumerate(spec.targets_at):
        field = f"targets_at[{i}]"
        (at,) = read_positions((position,), False, len(ids), f"{field}.position")
        if at in asked:
            raise InvalidRequest(
                f"{field}.position", f"position {at} is given twice; expected one target for each"
            )
        asked.add(at)
        found[at] = read_single_target(model, token, f"{field}.target")
    return found


def _single_targets(
    model: ResidentModel, spec: TraceSpec | InterveneSpec, fields: IndependentFields
) -> tuple[int | None, int | None]:
    """Return the target and the second token; None where the request has none."""
    target, other = (
        None if asked is None else fields.read(read_single_target, model, asked, field)
        for asked, field in ((spec.target, "target"), (spec.other, "other"))
    )
    return target, other


def resolve_activations(
    model: ResidentModel, spec: ActivationsSpec, check_cancelled: CancelCheck = never_cancelled
) -> ResolvedActivations:
    """Resolve an Activations request.

    Raises `InvalidRequest` for an invalid prompt, position or head, and for a site that a requested
    layer does not have.
    """
    started = time.perf_counter()
    with IndependentFields() as fields:
        tokens = fields.read(read_prompt, model, spec.prompt, check_cancelled=check_cancelled)
        keys = fields.read(read_sites_of, model, spec.sites, spec.layers)
    others = OtherPrompts(model, check_cancelled)
    with IndependentFields() as fields:
        positions = fields.read(read_positions, spec.positions, not spec.positions, len(tokens))
        heads = fields.read(read_heads, model, spec.heads, keys, len(tokens))
        chosen_experts = fields.read(read_experts, model, spec.experts, keys)
        interventions = fields.read(
            read_interventions, model, spec.interventions, len(tokens), others=others
        )
    experts = tuple(sorted(chosen_experts))
    sizes = {}
    for key in keys:
        shape = site_shape(model, key, len(tokens))
        chosen = heads if key[1] in SITES_WITH_HEADS else experts
        whole = prod(shape)
        sizes[key] = whole // shape[0] * len(chosen) if chosen and len(shape) == 2 else whole
    return ResolvedActivations(
        model=model,
        spec=spec,
        tokens=tokens,
        positions=positions,
        keys=keys,
        sizes=sizes,
        heads=heads,
        experts=experts,
        limited_layers=_lacking(model, spec, keys),
        interventions=interventions,
        seconds=time.perf_counter() - started,
    )


def _lacking(
    model: ResidentModel, spec: ActivationsSpec, keys: Collection[SiteKey]
) -> tuple[LayerLevel, ...]:
    """Return the requested layers that lack a requested site because their parts are unknown."""
    inside = [site for site in spec.sites if site not in BEFORE_LAYERS + AFTER_LAYERS]
    limited = model.view.limited(read_layers(model, spec.layers))
    return tuple(
        found for found in limited if any((found.layer, site) not in keys for site in inside)
    )


# Tokens of a batch of experiments, and its logits; more would take memory and save no time.
BATCH_TOKENS, BATCH_LOGITS = 1024, 2**24


def resolve_intervene(
    model: ResidentModel, spec: InterveneSpec, check_cancelled: CancelCheck = never_cancelled
) -> ResolvedIntervene:
    """Resolve an Intervene.

    Raises `InvalidRequest` for an invalid prompt, target, position, intervention or sweep.
    """
    started = time.perf_counter()
    with IndependentFields() as fields:
        tokens = fields.read(read_prompt, model, spec.prompt, check_cancelled=check_cancelled)
        target, other = _single_targets(model, spec, fields)
    others, length = OtherPrompts(model, check_cancelled), len(tokens)
    with IndependentFields() as fields:
        positions = fields.read(read_positions, spec.positions, False, length)
        always = fields.read(
            read_interventions, model, spec.always, length, field="always", others=others
        )
    logits = len(positions) * model.view.facts.vocab_size
    return ResolvedIntervene(
        model=model,
        spec=spec,
        tokens=tokens,
        positions=positions,
        target=target,
        other=other,
        always=always,
        experiments=read_experiments(model, spec, len(tokens), always, others),
        at_once=max(1, min(BATCH_TOKENS // len(tokens), BATCH_LOGITS // logits)),
        seconds=time.perf_counter() - started,
    )


def resolve_gradient_lens(
    model: ResidentModel, spec: GradientLensSpec, check_cancelled: CancelCheck = never_cancelled
) -> ResolvedGradientLens:
    """Resolve a GradientLens.

    Raises `InvalidRequest` for an invalid prompt, loss, layer, matrix or subject.
    """
    started = time.perf_counter()
    with IndependentFields() as fields:
        objective = fields.read(read_objective, model, spec, check_cancelled)
        layers = fields.read(read_layers, model, spec.layers)
    matrices, skipped = gradient_matrices(model, spec, layers)
    attention_layers: tuple[int, ...] = ()
    without_attention: tuple[int, ...] = ()
    if spec.include_attention_gradients:
        having = {i for i in layers if Site.ATTENTION_PATTERN in sites_of_layer(model, i)}
        attention_layers = tuple(layer for layer in layers[::-1] if layer in having)
        without_attention = tuple(layer for layer in layers if layer not in having)
    return ResolvedGradientLens(
        model=model,
        spec=spec,
        objective=objective,
        matrices=matrices,
        skipped=skipped,
        without_attention=without_attention,
        limited_layers=model.view.limited(layers),
        segments=read_segments(spec.subject, spec.prompt, objective),
        interventions=read_interventions(
            model,
            spec.interventions,
            len(objective.tokens),
            objective.prompt_length,
            others=OtherPrompts(model, check_cancelled),
        ),
        attention_layers=attention_layers,
        seconds=time.perf_counter() - started,
    )


def resolve_project(
    model: ResidentModel, spec: ProjectSpec, check_cancelled: CancelCheck = never_cancelled
) -> ResolvedProject:
    """Resolve a Project.

    Raises `InvalidRequest` if the vectors have another width, or the target has several tokens.
    """
    check_cancelled()
    target = None
    with IndependentFields() as fields:
        fields.read(_check_width, model, spec.vectors.shape[1])
        if spec.target is not None:
            target = fields.read(read_single_target, model, spec.target, "target")
    return ResolvedProject(model, spec, target)


def _check_width(model: ResidentModel, width: int) -> None:
    facts = model.view.facts
    widths = dict.fromkeys((facts.d_model, facts.stream_width))
    if width not in widths:
        expected = " or ".join(map(str, widths))
        raise InvalidRequest(
            "vectors.shape", f"vectors have width {width}; expected {expected} for {model.name}"
        )


def resolve_preview_edit(
    model: ResidentModel, spec: PreviewEditSpec, check_cancelled: CancelCheck = never_cancelled
) -> ResolvedPreviewEdit:
    """Resolve a PreviewEdit.

    Raises `InvalidRequest` for an invalid prompt, target, layer, matrix or intervention.
    """
    with IndependentFields() as fields:
        targets = fields.read(_edit_targets, model, spec)
        edits = fields.read(read_edits, model, spec)
    others = OtherPrompts(model, check_cancelled)
    room = len(targets) - 1
    with IndependentFields() as fields:
        prompt = fields.read(read_prompt, model, spec.prompt, room, check_cancelled=check_cancelled)
        probes = fields.read(_probes, model, spec, targets[0], check_cancelled)
    own = Watched("", tuple(token.id for token in prompt), targets[0])
    forced = read_interventions(
        model, spec.interventions, len(prompt) + room, len(prompt), others=others
    )
    watched = [
        replace(each, interventions=_interventions_on(model, spec, i, len(each.ids), others))
        for i, each in enumerate((own, *probes))
    ]
    return ResolvedPreviewEdit(model, spec, targets, watched, edits, forced)


def _edit_targets(model: ResidentModel, spec: PreviewEditSpec) -> tuple[int, ...]:
    """Return the tokens of the edit's target: several only for the loss of a descent step."""
    if isinstance(spec.edit, ForwardShift):
        return (read_single_target(model, spec.target, "target"),)
    return read_target(model, spec.target, "target")


def _interventions_on(
    model: ResidentModel, spec: PreviewEditSpec, number: int, length: int, others: OtherPrompts
) -> tuple[Intervention, ...]:
    """Resolve the interventions for a prompt: 0 is that of the edit, probes follow."""
    try:
        return read_interventions(model, spec.interventions, length, others=others)
    except InvalidRequest as error:
        if number == 0:
            raise
        (violation,) = error.violations
        description = f"on probes[{number - 1}]: {violation.description}"
        raise InvalidRequest(violation.field, description) from error


def _probes(
    model: ResidentModel, spec: PreviewEditSpec, target: int, check_cancelled: CancelCheck
) -> list[Watched]:
    watched = []
    for i, probe in enumerate(spec.probes):
        field = f"probes[{i}]"
        tokens = read_prompt(
            model, probe.prompt, field=f"{field}.input", check_cancelled=check_cancelled
        )
        token = target
        if probe.target is not None:
            token = read_single_target(model, probe.target, f"{field}.target")
        watched.append(Watched(probe.label, tuple(token.id for token in tokens), token))
    return watched


def resolve_find_neurons(
    model: ResidentModel, spec: FindNeuronsSpec, check_cancelled: CancelCheck = never_cancelled
) -> ResolvedFindNeurons:
    """Resolve a FindNeurons.

    Raises `InvalidRequest` for an invalid token or layer.
    """
    check_cancelled()
    with IndependentFields() as fields:
        token = fields.read(read_single_target, model, spec.token, "token")
        layers = fields.read(layers_with_parts, model, spec.layers, part=Part.MLP)
    limited = model.view.limited(read_layers(model, spec.layers))
    return ResolvedFindNeurons(model, spec, token, layers, limited)


def resolve_generate(
    model: ResidentModel, spec: GenerateSpec, check_cancelled: CancelCheck = never_cancelled
) -> ResolvedGenerate:
    """Resolve a Generate.

    Raises `InvalidRequest` for an invalid prompt, layer or intervention.
    """
    started = time.perf_counter()
    layers: tuple[int, ...] = ()
    with IndependentFields() as fields:
        tokens = fields.read(read_prompt, model, spec.prompt, check_cancelled=check_cancelled)
        if spec.reading is not None:
            layers = fields.read(read_layers, model, spec.reading.layers, "reading.layers")
    # The last token is not fed to the model, so it needs no position.
    room = model.view.facts.max_positions - len(tokens) + 1
    return ResolvedGenerate(
        model=model,
        spec=spec,
        tokens=tokens,
        layers=layers,
        max_new_tokens=min(spec.max_new_tokens, room),
        interventions=read_interventions(
            model,
            spec.interventions,
            len(tokens),
            others=OtherPrompts(model, check_cancelled),
            generating=True,
        ),
        seconds=time.perf_counter() - started,
    )

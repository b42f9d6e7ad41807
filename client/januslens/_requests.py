"""Build request messages from the arguments of a client's methods.

The arguments of the streaming calls are declared and documented here only; client/generate.py
writes the methods of the clients that take them (`make client`).

Arguments that no server could accept raise ValueError or TypeError. The server checks what depends
on the model, such as layer numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from januslens.arguments import (
    Edit,
    Layers,
    Loss,
    Messages,
    NegativeLogLikelihood,
    Positions,
    Probe,
    Prompt,
    SubjectLike,
    TargetLike,
    bounded_number,
    chat_message,
    checked_text,
    count,
    finite_number,
    index_numbers,
    input_message,
    layer_numbers,
    matrix_numbers,
    module_names,
    optional_count,
    position_numbers,
    probe_message,
    set_edit,
    set_edit_grid,
    set_loss,
    source_messages,
    subject_message,
    target_message,
    unit_messages,
)
from januslens.interventions import (
    Experiment,
    Intervention,
    SweepOver,
    experiment_message,
    intervention_messages,
    sweep_message,
)
from januslens.results.kinds import (
    CRITERIA,
    LENSES,
    NODE_KINDS,
    SITES,
    Criterion,
    Lens,
    MatrixKind,
    NodeKind,
    Site,
)
from januslens.results.trace import Trace, TraceHeader
from januslens.results.vectors import Tensor, tensor_message
from januslens.v1 import (
    activations_pb2,
    common_pb2,
    edits_pb2,
    generation_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    lens_pb2,
    models_pb2,
    neurons_pb2,
    trace_pb2,
)


def trace_request(  # noqa: PLR0913 - by keyword
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
    select_by: Criterion | str | None = None,
    other: TargetLike | None = None,
    attribution: bool = False,
    gradients: bool = False,
    only_heads: Iterable[tuple[int, int] | str] = (),
    only_neurons: Iterable[tuple[int, ...] | str] = (),
    only_sources: Iterable[tuple[int, int, int] | str] = (),
    targets: Mapping[int, TargetLike] | None = None,
    next_tokens: bool = False,
    model: str = "",
    revision: str = "",
) -> trace_pb2.TraceRequest:
    """Build the request of `trace`.

    Args:
        prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
        target: The token whose rank every projection reports: text of one token, in which a leading
            space counts, or a token id. None = the model's own next token at each position.
        messages: A conversation instead of a prompt: messages with `role` and `content`, or a
            `Chat`.
        layers: Layers to send, from 0 or negative from the last; None = all.
        positions: Query positions, negative from the end, or `"all"`; None = the last one.
        heads: Maximum heads per layer, largest score first; None = the server's default, 0 = all.
        memory_values: Maximum source positions per head, largest score first; None = the
            server's default, 0 = all.
        top_neurons: Maximum neurons per MLP, largest score first; None = the server's default, 0 =
            all.
        bottom_neurons: Maximum neurons per MLP, smallest score first; None = the server's default,
            0 = none.
        top_k: Most likely tokens per projection; None = the server's default, 0 = none.
        bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
        lens: `FINAL_NORM`, `NORMALIZED` (scale each vector to length 1 first) or `RAW`.
        node_kinds: Node kinds to send; None = all. Hiding nodes does not change any sum.
        vectors: Send the vectors of the nodes.
        logit_contribution: Send each part's contribution to the target's logit.
        overlap_k: Send each edge's intersection score, computed on this many top tokens.
        checks: Repeat the model's self-check on this request and report it in the summary.
        projections: Project the nodes to the vocabulary, which takes most of the time of a trace;
            None = yes, unless `top_k` and `bottom_k` are 0.
        interventions: Changes of the forward pass, made by `januslens.interventions`.
        select_by: Score by which heads, sources and neurons are selected: `VISIT` (norm, attention,
            and activation times norm), `CONTRIBUTION` to the target's logit, or `ATTRIBUTION`; None
            = the server's default, `VISIT`.
        other: A second token: logit contributions and attributions are those of the difference
            between the target's logit and this token's logit.
        attribution: Send each part's first-order effect on the target's logit at the last position
            of the trace, and the norms of the states' gradients. This takes a backward pass.
        gradients: Send the gradients of the states, projected to the vocabulary.
        only_heads: Heads to send instead of those with the largest scores, as pairs of layer and
            head such as `[(9, 6), (9, 9)]`, or as ids of their nodes, whose position is not used.
            Unless `layers` is given, only their layers are sent.
        only_neurons: Neurons to send instead, as pairs of layer and neuron, as layer, expert and
            neuron in a mixture of experts, or as ids of their nodes.
        only_sources: Sources to send instead of those with the largest scores, as layer, head and
            source position such as `[(9, 6, -2)]`, or as ids of MEMORY_KEY or MEMORY_VALUE nodes.
            Of the heads, only these and those of `only_heads` are sent.
        targets: The targets of single positions, which replace `target` there.
        next_tokens: Take the next token of the prompt as the target of each position (teacher
            forcing). `target` is then the target of the last position only.
        model: The model's name; may be empty if only one is loaded.
        revision: The expected revision; any other is refused. Empty = any.
    """
    numbers, all_positions = position_numbers(positions)
    return trace_pb2.TraceRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        input=input_message(prompt, messages),
        target=None if target is None else target_message(target),
        layers=layer_numbers(layers),
        positions=numbers,
        all_positions=all_positions,
        selection=trace_pb2.Selection(
            heads=optional_count(heads, "heads"),
            memory_values_per_head=optional_count(memory_values, "memory_values"),
            top_neurons=optional_count(top_neurons, "top_neurons"),
            bottom_neurons=optional_count(bottom_neurons, "bottom_neurons"),
            by=CRITERIA.number(
                Criterion.UNSPECIFIED if select_by is None else Criterion.of(select_by)
            ),
            only_heads=unit_messages(only_heads, "only_heads"),
            only_neurons=unit_messages(only_neurons, "only_neurons"),
            only_sources=source_messages(only_sources),
        ),
        targets_at=[
            trace_pb2.PositionedTarget(position=position, target=target_message(found, "targets"))
            for position, found in (targets or {}).items()
        ],
        next_token_targets=next_tokens,
        top_k=optional_count(top_k, "top_k"),
        bottom_k=optional_count(bottom_k, "bottom_k"),
        lens=LENSES.number(Lens.of(lens)),
        node_kinds=[NODE_KINDS.number(kind) for kind in _kinds(node_kinds)],
        include_vectors=vectors,
        include_logit_contribution=logit_contribution,
        overlap_k=optional_count(overlap_k, "overlap_k"),
        include_checks=checks,
        interventions=intervention_messages(interventions),
        include_projections=projections,
        other=None if other is None else target_message(other, "other"),
        include_attribution=attribution,
        include_gradients=gradients,
    )


def _kinds(kinds: Iterable[NodeKind | str] | None) -> list[NodeKind]:
    """Resolve node kinds. None becomes an empty list, which the server reads as all kinds.

    An empty list of the caller is refused, because it probably does not mean all kinds.
    """
    if kinds is None:
        return []
    named = [NodeKind.of(kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    if not named:
        raise ValueError("node_kinds is empty; give at least one kind, or None for all")
    return named


_RESIDUALS = {NodeKind.BLOCK_INPUT, NodeKind.BLOCK_OUTPUT}
_STEPS = {
    NodeKind.RESIDUAL_MID,
    NodeKind.ATTENTION_OUTPUT,
    NodeKind.MIXER_OUTPUT,
    NodeKind.MLP_OUTPUT,
}
_ATTENTION = {
    NodeKind.ATTENTION_CONCAT,
    NodeKind.ATTENTION_SUM,
    NodeKind.HEAD_OUTPUT,
    NodeKind.MEMORY_VALUE,
}
_HEADS = 3  # heads per cell, each with the source that it attends to most

# A cell is one layer at one position. Overviews with few cells show more of each cell.
_CELLS_WITH_HEADS = 300  # up to here, the strongest heads
_CELLS_WITH_STEPS = 1_000  # up to here, the steps between residuals
_CELLS = 5_000  # beyond, the earliest positions are left out


def overview_request(
    trace: Trace, *, lens: Lens | str = Lens.FINAL_NORM, top_k: int | None = 3
) -> trace_pb2.TraceRequest:
    """Build the request of `AsyncClient.trace_overview`."""
    header, positions = trace.header, len(trace.prompt_tokens)
    layers = len(header.layers)
    whole = layers == header.sizes.n_layers
    targets = {target.target.id for target in trace.targets}
    return trace_request(
        [token.id for token in trace.prompt_tokens],
        targets.pop() if len(targets) == 1 else None,
        layers=None if whole else header.layers,
        positions=range(max(0, positions - _CELLS // layers), positions),
        heads=_HEADS,
        memory_values=1,
        top_k=top_k,
        bottom_k=0,
        lens=lens,
        node_kinds=sorted(_overview_kinds(layers * positions) & _kinds_shown(header, whole)),
        model=trace.provenance.model,
        revision=trace.provenance.revision,
    )


def _overview_kinds(cells: int) -> set[NodeKind]:
    if cells <= _CELLS_WITH_HEADS:
        return _RESIDUALS | _STEPS | _ATTENTION
    return _RESIDUALS | _STEPS if cells <= _CELLS_WITH_STEPS else _RESIDUALS


def _kinds_shown(header: TraceHeader, whole: bool) -> set[NodeKind]:
    """Return the kinds that a request may name: those of all layers, if it names layers.

    A request for the `whole` model names none; it may name the kinds of some layers.
    """
    levels = {limited.level for limited in header.limited_layers}
    if whole and len(header.limited_layers) < len(header.layers):
        levels = set()
    if "STREAM" in levels:
        return _RESIDUALS
    return _RESIDUALS | _STEPS if levels else _RESIDUALS | _STEPS | _ATTENTION


def gradient_lens_request(  # noqa: PLR0913 - by keyword
    prompt: Prompt | None = None,
    target: TargetLike | None = None,
    *,
    messages: Messages | None = None,
    loss: Loss | None = None,
    matrices: Iterable[MatrixKind | str] | None = None,
    modules: Iterable[str] = (),
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
    attention: bool = False,
    interventions: Iterable[Intervention] = (),
    model: str = "",
    revision: str = "",
) -> gradient_lens_pb2.GradientLensRequest:
    """Build the request of `gradient_lens`.

    Args:
        prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
        target: The target of the loss `-log p(target | prompt)`: text, in which a leading space
            counts, one token id or several. Pass either `target` or `loss`.
        messages: A conversation instead of a prompt: messages with `role` and `content`, or a
            `Chat`.
        loss: A `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
        matrices: Kinds of matrices; None = `["FF1", "FF2"]`. For a gated MLP, FF1 means GATE and
            UP. None with `modules` = no kinds.
        modules: Linear maps to send as well, by the names of their modules in the block, for
            example `linear_attn.out_proj`; `*` stands for any characters. `Model.levels` has the
            names.
        layers: Layers to send, from 0 or negative from the last; None = all.
        top_k: Most likely tokens per projection; None = the server's default, 0 = none.
        bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
        lens: `FINAL_NORM`, `NORMALIZED` (for very small VJPs, as in the paper) or `RAW`.
        components: Maximum factor pairs per matrix, largest first; None = the server's default, 0 =
            all, which the dense gradient needs.
        spectrum: Number of singular values and directions per matrix.
        neurons: Number of neurons per matrix, largest change by a descent step first.
        learning_rate: Learning rate of the descent step; None = report only the direction of the
            change.
        subject: The subject of the prompt, as text or as token positions `(start, end)`; adds norms
            and ranks by segment.
        factors: Send the factors, for `matrix.gradient()` and `gradient.save_factors()`.
        verify: Compare each matrix with autograd's dense gradient.
        attention: Send the attention patterns of the layers and their gradients (Reversed
            Attention; Katz & Wolf, 2025).
        interventions: Changes of the forward pass, made by `januslens.interventions`.
        model: The model's name; may be empty if only one is loaded.
        revision: The expected revision; any other is refused. Empty = any.
    """
    request = gradient_lens_pb2.GradientLensRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        input=input_message(prompt, messages),
        matrices=matrix_numbers(matrices),
        modules=module_names(modules),
        layers=layer_numbers(layers),
        top_k=optional_count(top_k, "top_k"),
        bottom_k=optional_count(bottom_k, "bottom_k"),
        lens=LENSES.number(Lens.of(lens)),
        components=optional_count(components, "components"),
        spectrum_rank=count(spectrum, "spectrum"),
        neurons=count(neurons, "neurons"),
        learning_rate=None
        if learning_rate is None
        else finite_number(learning_rate, "learning_rate"),
        subject=None if subject is None else subject_message(subject),
        include_factors=factors,
        verify=verify,
        include_attention_gradients=attention,
        interventions=intervention_messages(interventions),
    )
    set_loss(request, _one_loss(target, loss))
    return request


def _one_loss(target: TargetLike | None, loss: Loss | None) -> Loss:
    if loss is None and target is not None:
        return NegativeLogLikelihood(target)
    if target is None and loss is not None:
        return loss
    if loss is None:
        raise ValueError("no target and no loss given; give one of them")
    raise ValueError("target and loss are both given; give only one of them")


def activations_request(  # noqa: PLR0913 - by keyword
    prompt: Prompt | None = None,
    *,
    messages: Messages | None = None,
    sites: Site | str | Iterable[Site | str] = Site.BLOCK_OUTPUT,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: int | Iterable[int] | None = None,
    experts: int | Iterable[int] | None = None,
    float32: bool = False,
    interventions: Iterable[Intervention] = (),
    model: str = "",
    revision: str = "",
) -> activations_pb2.ActivationsRequest:
    """Build the request of `activations`.

    Args:
        prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
        messages: A conversation instead of a prompt: messages with `role` and `content`, or a
            `Chat`.
        sites: The sites to read, such as `["HEAD_RESULT", "BLOCK_OUTPUT"]`.
        layers: Layers to read, from 0 or negative from the last; None = every layer that
            has the site.
        positions: Positions to read, negative from the end; None or `"all"` = all of them.
        heads: Heads to read at sites with heads, from 0; None = all. KEY and VALUE have key-value
            heads.
        experts: Routed experts to read the NEURONS of, from 0; None = all.
        float32: Convert the values to float32. By default they have the model's data type.
        interventions: Changes of the forward pass, made by `januslens.interventions`.
        model: The model's name; may be empty if only one is loaded.
        revision: The expected revision; any other is refused. Empty = any.
    """
    named = [Site.of(site) for site in ([sites] if isinstance(sites, str) else sites)]
    if not named:
        raise ValueError("sites is empty; give at least one site")
    return activations_pb2.ActivationsRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        input=input_message(prompt, messages),
        sites=[SITES.number(site) for site in named],
        layers=layer_numbers(layers),
        positions=position_numbers(positions)[0],
        heads=index_numbers(heads, "heads"),
        experts=index_numbers(experts, "experts"),
        interventions=intervention_messages(interventions),
        data_type=common_pb2.DATA_TYPE_FLOAT32 if float32 else common_pb2.DATA_TYPE_UNSPECIFIED,
    )


def intervene_request(  # noqa: PLR0913 - by keyword
    prompt: Prompt | None = None,
    experiments: Iterable[Experiment | Intervention] = (),
    *,
    messages: Messages | None = None,
    target: TargetLike | None = None,
    other: TargetLike | None = None,
    sweep: SweepOver | None = None,
    always: Iterable[Intervention] = (),
    positions: int | Iterable[int] | None = None,
    top_k: int | None = None,
    model: str = "",
    revision: str = "",
) -> intervene_pb2.InterveneRequest:
    """Build the request of `intervene`.

    Args:
        prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
        experiments: Experiments, or interventions that are experiments by themselves.
        messages: A conversation instead of a prompt: messages with `role` and `content`, or a
            `Chat`.
        target: The token whose probability is reported, as text, in which a leading space counts,
            or as an id; None = the model's own prediction without interventions.
        other: A second token; the difference of both logits is reported.
        sweep: Further experiments: an intervention split by layer, position, head, neuron or
            source. There may be 16,384 experiments in all.
        always: Interventions of every experiment, before its own, but not of the header.
        positions: Positions where the prediction is read, negative from the end; None = the last.
        top_k: Number of tokens to list in each prediction, at most 100; None = 5.
        model: The model's name; may be empty if only one is loaded.
        revision: The expected revision; any other is refused. Empty = any.
    """
    if isinstance(experiments, Experiment | Intervention):
        experiments = [experiments]
    listed = [experiment_message(experiment) for experiment in experiments]
    if not listed and sweep is None:
        raise ValueError("no experiments and no sweep given; give at least one of them")
    numbers, everywhere = position_numbers(positions)
    if everywhere:
        raise ValueError('invalid positions "all"; expected integers')
    return intervene_pb2.InterveneRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        input=input_message(prompt, messages),
        target=None if target is None else target_message(target),
        other=None if other is None else target_message(other, "other"),
        experiments=listed,
        sweep=None if sweep is None else sweep_message(sweep),
        always=intervention_messages(always),
        positions=numbers,
        top_k=optional_count(top_k, "top_k"),
    )


def generate_request(  # noqa: PLR0913 - by keyword
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
    interventions: Iterable[Intervention] = (),
    model: str = "",
    revision: str = "",
) -> generation_pb2.GenerateRequest:
    """Build the request of `generate`.

    Args:
        prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
        messages: A conversation instead of a prompt: messages with `role` and `content`, or a
            `Chat`.
        max_new_tokens: Maximum number of tokens; None = the server's default.
        temperature: Divides the logits before a token is drawn; 0 = take the most likely token.
        sample_top_k: Number of most likely tokens to draw from; 0 = all.
        top_p: Draw from the fewest most likely tokens whose probabilities add up to at least this;
            0 = all.
        seed: Seed of the draws; the same seed draws the same tokens.
        stop: Text or texts that end the generation; the last token completes the text.
        top_k: Most likely tokens to list at each step; None = the server's default, 0 = none.
        layers: Layers whose output is read at each step, from 0, or `"all"`; None = none.
        layer_top_k: Most likely tokens to list per layer; None = the server's default, 0 = none.
        interventions: Changes of the forward passes, made by `januslens.interventions`. Those
            without positions also apply to every generated token.
        model: The model's name; may be empty if only one is loaded.
        revision: The expected revision; any other is refused. Empty = any.
    """
    if optional_count(max_new_tokens, "max_new_tokens") == 0:
        raise ValueError("invalid max_new_tokens 0; expected at least 1")
    texts = [stop] if isinstance(stop, str) else list(stop)
    if "" in texts:
        raise ValueError("a stop text is empty; give at least one character")
    reading = None
    if layers is not None:
        numbers = [] if isinstance(layers, str) and layers == "all" else layer_numbers(layers)
        reading = generation_pb2.LayerReading(
            layers=numbers, top_k=optional_count(layer_top_k, "layer_top_k")
        )
    return generation_pb2.GenerateRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        input=input_message(prompt, messages),
        max_new_tokens=max_new_tokens,
        sampling=generation_pb2.Sampling(
            temperature=bounded_number(temperature, "temperature"),
            top_k=count(sample_top_k, "sample_top_k"),
            top_p=bounded_number(top_p, "top_p", 1.0),
            seed=count(seed, "seed", 2**64),
        ),
        stop=[checked_text(text, "stop") for text in texts],
        top_k=optional_count(top_k, "top_k"),
        reading=reading,
        interventions=intervention_messages(interventions),
    )


def project_request(
    vectors: ArrayLike,
    *,
    target: TargetLike | None = None,
    lens: Lens | str = Lens.FINAL_NORM,
    top_k: int | None = None,
    bottom_k: int | None = None,
    model: str = "",
    revision: str = "",
) -> lens_pb2.ProjectRequest:
    """Build the request of `AsyncClient.project`."""
    rows = np.asarray(vectors)
    if rows.ndim not in (1, 2) or rows.size == 0:
        raise ValueError(
            f"invalid vectors of shape {rows.shape}; expected [d_model] or [n, d_model]"
        )
    sent = tensor_message(np.atleast_2d(rows))
    if not np.isfinite(Tensor.from_message(sent).float32()).all():
        raise ValueError("vectors contain infinity or NaN in float32; give finite numbers")
    return lens_pb2.ProjectRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        vectors=sent,
        lens=LENSES.number(Lens.of(lens)),
        target=None if target is None else target_message(target),
        top_k=optional_count(top_k, "top_k"),
        bottom_k=optional_count(bottom_k, "bottom_k"),
    )


def preview_edit_request(
    prompt: Prompt,
    target: TargetLike,
    edit: Edit,
    *,
    probes: Iterable[Probe | str] = (),
    interventions: Iterable[Intervention] = (),
    model: str = "",
    revision: str = "",
) -> edits_pb2.PreviewEditRequest:
    """Build the request of `AsyncClient.preview_edit`."""
    request = edits_pb2.PreviewEditRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        input=input_message(prompt),
        target=target_message(target),
        probes=[probe_message(probe) for probe in probes],
        interventions=intervention_messages(interventions),
    )
    set_edit(request, edit)
    return request


def preview_edits_request(  # noqa: PLR0913 - by keyword
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
) -> edits_pb2.PreviewEditRequest:
    """Build the request of `AsyncClient.preview_edits`."""
    request = edits_pb2.PreviewEditRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        input=input_message(prompt),
        target=target_message(target),
        probes=[probe_message(probe) for probe in probes],
        interventions=intervention_messages(interventions),
    )
    set_edit_grid(request, learning_rates, etas, layers, matrices, gradient_cosine)
    return request


# The maximum size of a page of neurons.
_PAGE = 1000


def find_neurons_request(
    token: TargetLike,
    *,
    suppressed: bool = False,
    layers: Layers | None = None,
    limit: int | None = 20,
    model: str = "",
    revision: str = "",
) -> neurons_pb2.FindNeuronsRequest:
    """Build the first request of `AsyncClient.find_neurons`."""
    if optional_count(limit, "limit") == 0:
        raise ValueError("invalid limit 0; expected at least 1, or None for no limit")
    return neurons_pb2.FindNeuronsRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        token=target_message(token, "token"),
        suppressed=suppressed,
        layers=layer_numbers(layers),
        page_size=_page_size(limit),
    )


def next_page_request(
    request: neurons_pb2.FindNeuronsRequest, page: neurons_pb2.FindNeuronsResponse, left: int | None
) -> neurons_pb2.FindNeuronsRequest | None:
    """Build the request of the page after `page`; None after the last page.

    `left` is the number of neurons still wanted, None = all.
    """
    if not page.next_page_token or left == 0:
        return None
    following = neurons_pb2.FindNeuronsRequest()
    following.CopyFrom(request)
    following.page_token, following.page_size = page.next_page_token, _page_size(left)
    return following


def _page_size(left: int | None) -> int:
    return _PAGE if left is None else min(left, _PAGE)


def tokenize_request(
    text: str | None = None,
    *,
    messages: Messages | None = None,
    special_tokens: bool = False,
    literal: bool = False,
    model: str = "",
    revision: str = "",
) -> models_pb2.TokenizeRequest:
    """Build the request of `AsyncClient.tokenize`."""
    if text is None and messages is None:
        raise ValueError("no text and no messages given; give one of them")
    if text is not None and messages is not None:
        raise ValueError("text and messages are both given; give only one of them")
    if messages is not None and (special_tokens or literal):
        raise ValueError("special_tokens and literal do not apply to messages; leave them out")
    return models_pb2.TokenizeRequest(
        model=checked_text(model, "model"),
        revision=checked_text(revision, "revision"),
        text=checked_text(text or "", "text"),
        with_special_tokens=special_tokens,
        literal=literal,
        chat=None if messages is None else chat_message(messages),
    )

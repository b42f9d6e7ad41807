"""Compute the demand of any request; here those of Project, PreviewEdit and FindNeurons."""

from __future__ import annotations

from januslens_server.models.neuron_index import ENTRY_BYTES, ROW_BYTES
from januslens_server.models.resident import cost_sizes
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.activations import activations_demand
from januslens_server.pipelines.cost.demand import (
    BACKWARD,
    FORWARD,
    Demand,
    lens_flops,
    pass_flops,
    reading_bytes,
    texts_bytes,
)
from januslens_server.pipelines.cost.generate import generate_demand
from januslens_server.pipelines.cost.gradient_lens import gradient_lens_demand, matrix_sizes
from januslens_server.pipelines.cost.intervene import intervene_demand
from januslens_server.pipelines.cost.interventions import with_interventions
from januslens_server.pipelines.cost.trace import trace_demand
from januslens_server.pipelines.resolve import (
    Resolved,
    ResolvedActivations,
    ResolvedFindNeurons,
    ResolvedGenerate,
    ResolvedGradientLens,
    ResolvedIntervene,
    ResolvedPreviewEdit,
    ResolvedProject,
    ResolvedTrace,
)
from januslens_server.specs import ForwardShift, LensSpec


def demand_of(request: Resolved) -> Demand:  # noqa: PLR0911 - one for each RPC
    """Return the demand of a resolved request."""
    match request:
        case ResolvedTrace():
            own, tokens = trace_demand(request), len(request.tokens)
            return with_interventions(own, request.model, request.interventions, tokens)
        case ResolvedActivations():
            own, tokens = activations_demand(request), len(request.tokens)
            return with_interventions(own, request.model, request.interventions, tokens)
        case ResolvedGradientLens():
            own, tokens = gradient_lens_demand(request), len(request.objective.tokens)
            changes = request.interventions
            return with_interventions(own, request.model, changes, tokens, backward=True)
        case ResolvedIntervene():
            return intervene_demand(request)
        case ResolvedProject():
            return project_demand(request)
        case ResolvedPreviewEdit():
            return preview_edit_demand(request)
        case ResolvedFindNeurons():
            return find_neurons_demand(request)
        case ResolvedGenerate():
            return generate_demand(request)


EFFECT_BYTES = 128
NEURON_BYTES = 48


def project_demand(request: ResolvedProject) -> Demand:
    """Return the demand of projecting the caller's vectors."""
    spec = request.spec
    sizes, vectors = cost_sizes(request.model), len(spec.vectors)
    listed = spec.lens.top_k + spec.lens.bottom_k
    return Demand(
        flops=lens_flops(sizes, vectors),
        vectors=vectors,
        readings=1,
        ranks=0 if spec.target is None else vectors,
        memory=memory.read(sizes, vectors, listed),
        stream=vectors * reading_bytes(listed) + texts_bytes(sizes, vectors * listed),
    )


def preview_edit_demand(request: ResolvedPreviewEdit) -> Demand:
    """Return the demand of computing the edits, and of every prompt before and after each."""
    targets, sizes = request.targets, cost_sizes(request.model)
    first, *probes = (len(prompt.ids) for prompt in request.watched)
    own = first + len(targets) - 1
    watched = [own, *probes]
    making = FORWARD if isinstance(request.spec.edit, ForwardShift) else 0
    making += FORWARD + BACKWARD if request.spec.takes_gradient else 0
    edits = len(request.edits)
    read = (1 + edits) * len(watched)
    flops = making * pass_flops(sizes, own)
    flops += (1 + edits) * sum(pass_flops(sizes, n) for n in watched)
    for edit in request.edits:  # a change has one component per token of the prompt
        widths = matrix_sizes(request.model, edit.matrices, sizes, own).widths
        flops += 2.0 * own * sum(watched) * widths
    kept = memory.kept_for_backward(sizes, own)
    changes = [(prompt.interventions, len(prompt.ids)) for prompt in request.watched]
    changes.append((request.interventions, own))
    demand = Demand(
        passes=making + read,
        flops=flops,
        memory=sizes.facts.n_layers * kept
        + memory.passing(sizes, max(watched), len(targets))
        + memory.read(sizes, 2 * len(watched), 0),
        stream=edits * len(watched) * EFFECT_BYTES + texts_bytes(sizes, (2 + edits) * len(watched)),
        held=sizes.facts.n_layers * kept
        + 2 * len(watched) * memory.FLOAT32 * sizes.facts.vocab_size,
        readings=read,
        vectors=read,
    )
    for found, tokens in changes:
        demand = with_interventions(demand, request.model, found, tokens)
    return demand


def find_neurons_demand(request: ResolvedFindNeurons) -> Demand:
    """Return the demand of indexing the layers that have not been indexed yet."""
    model, spec = request.model, request.spec
    sizes = cost_sizes(model)
    unread = model.neurons.unread(request.layers)
    of_layer = model.view.n_neurons
    listed = 2 * LensSpec().top_k
    return Demand(
        flops=lens_flops(sizes, unread * of_layer),
        vectors=unread * of_layer,
        readings=unread,
        memory=memory.read(sizes, min(1, unread) * of_layer, 2 * model.neurons.depth)
        + memory.float_copies(sizes)
        + unread * of_layer * (ENTRY_BYTES * model.neurons.depth + ROW_BYTES),
        stream=spec.count * (NEURON_BYTES + reading_bytes(listed))
        + texts_bytes(sizes, spec.count * listed),
        held=min(1, unread) * of_layer * (ENTRY_BYTES * model.neurons.depth + 2 * ROW_BYTES)
        + memory.reported(spec.count, listed),
    )

"""The demands of what answers with one message: Project, PreviewEdit and FindNeurons."""

from __future__ import annotations

from januslens_server.models.neuron_index import ENTRY_BYTES, ROW_BYTES
from januslens_server.models.resident import ResidentModel, cost_sizes
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.demand import (
    BACKWARD,
    FORWARD,
    Demand,
    lens_flops,
    pass_flops,
)
from januslens_server.pipelines.cost.stream import reading_bytes, texts_bytes
from januslens_server.pipelines.inputs import (
    read_layers,
    read_prompt,
    read_single_target,
    read_target,
)
from januslens_server.specs import (
    DescentStep,
    FindNeuronsSpec,
    LensSpec,
    PreviewEditSpec,
    ProjectSpec,
)

EFFECT_BYTES = 128
NEURON_BYTES = 48


def project_demand(model: ResidentModel, spec: ProjectSpec) -> Demand:
    """The caller's vectors through the lens."""
    sizes, vectors = cost_sizes(model), len(spec.vectors)
    listed = spec.lens.top_k + spec.lens.bottom_k
    return Demand(
        flops=lens_flops(sizes, vectors),
        vectors=vectors,
        readings=1,
        ranks=0 if spec.target is None else vectors,
        memory=memory.read(sizes, vectors, listed),
        stream=vectors * reading_bytes(listed) + texts_bytes(sizes, vectors * listed),
    )


def preview_edit_demand(model: ResidentModel, spec: PreviewEditSpec) -> Demand:
    """The edit's own pass, then every prompt before and after.

    Raises `InvalidRequest` as the preview itself would for prompts and targets.
    """
    targets = read_target(model, spec.target, "target")
    own = len(read_prompt(model, spec.prompt, room=len(targets) - 1)) + len(targets) - 1
    probes = [
        len(read_prompt(model, probe.prompt, field=f"probes[{i}].input"))
        for i, probe in enumerate(spec.probes)
    ]
    sizes, watched = cost_sizes(model), [own, *probes]
    making = FORWARD + BACKWARD if isinstance(spec.edit, DescentStep) else FORWARD
    pairs = 2 * sum(pass_flops(sizes, tokens) for tokens in watched)
    kept = memory.kept_for_backward(sizes, own)
    read = 2 * len(watched) * memory.FLOAT32 * sizes.facts.vocab_size
    return Demand(
        passes=making + 2 * len(watched),
        flops=making * pass_flops(sizes, own) + 2 * pairs,
        memory=sizes.facts.n_layers * kept
        + memory.passing(sizes, max(watched), len(targets))
        + memory.read(sizes, 2 * len(watched), 0),
        stream=len(watched) * EFFECT_BYTES + texts_bytes(sizes, 3 * len(watched)),
        held=sizes.facts.n_layers * kept + read,
        readings=2 * len(watched),
        vectors=2 * len(watched),
    )


def find_neurons_demand(model: ResidentModel, spec: FindNeuronsSpec) -> Demand:
    """Every value of the layers that no request has read before, through the unembedding.

    Raises `InvalidRequest` as the search itself would for token and layers.
    """
    read_single_target(model, spec.token, "token")
    sizes, facts = cost_sizes(model), model.view.facts
    unread = model.neurons.unread(read_layers(model, spec.layers))
    of_layer = facts.d_mlp * max(1, facts.n_experts)
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

"""Messages of the RPCs that answer with a single message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from typing import Any

from januslens.v1 import cost_pb2, edits_pb2, lens_pb2, models_pb2, neurons_pb2
from januslens_server.errors import LimitExceeded
from januslens_server.results import (
    EditPreview,
    Effect,
    FoundNeurons,
    ModelStatus,
    ProjectionTable,
    Provenance,
)
from januslens_server.rpc.admission import Estimate
from januslens_server.rpc.encode.shared import (
    ReadToken,
    TokenTexts,
    guarantee_messages,
    named_tokens,
    projections,
    provenance_message,
)


def model_message(status: ModelStatus) -> models_pb2.Model:
    """Sizes and provenance only once the model is loaded."""
    message = models_pb2.Model(
        name=status.name,
        state=models_pb2.Model.State.ValueType(status.state),
        state_reason=status.reason,
        guarantees=guarantee_messages(status.guarantees),
        **({} if status.facts is None else asdict(status.facts)),
    )
    if status.provenance is not None:
        message.provenance.CopyFrom(provenance_message(status.provenance))
    return message


def estimate_message(
    estimate: Estimate[Any], exceeded: Iterable[LimitExceeded]
) -> cost_pb2.EstimateCostResponse:
    """Encode an estimate; `exceeded` are the limits that it exceeds."""
    limit = next((error.limit for error in exceeded), "")
    return cost_pb2.EstimateCostResponse(
        projected_vectors=estimate.demand.vectors,
        flops=estimate.demand.flops,
        device_bytes=estimate.cost.memory,
        stream_bytes=estimate.cost.stream,
        seconds=estimate.cost.seconds,
        admissible=not limit,
        limit_exceeded=limit,
    )


def project_response(
    table: ProjectionTable, provenance: Provenance, read_token: ReadToken
) -> lens_pb2.ProjectResponse:
    """One projection a vector, empty for a zero vector, and the texts of all tokens named."""
    read: list[Any] = [projection or {} for projection in projections(table)]
    return lens_pb2.ProjectResponse(
        projections=read,
        tokens=TokenTexts(read_token).texts(chain.from_iterable(named_tokens(table))),
        provenance=provenance_message(provenance),
    )


def preview_edit_response(
    preview: EditPreview, read_token: ReadToken
) -> edits_pb2.PreviewEditResponse:
    """Effects, and the texts of every token that they name."""
    named = {
        token_id
        for effect in (preview.edited, *preview.probes)
        for token_id in (effect.target_token_id, effect.predicted_before, effect.predicted_after)
    }
    return edits_pb2.PreviewEditResponse(
        edited=_effect(preview.edited),
        probes=[_effect(effect) for effect in preview.probes],
        provenance=provenance_message(preview.provenance),
        tokens=TokenTexts(read_token).texts(named),
    )


def _effect(effect: Effect) -> edits_pb2.Effect:
    return edits_pb2.Effect(**asdict(effect))


def find_neurons_response(
    found: FoundNeurons, next_page_token: str, read_token: ReadToken
) -> neurons_pb2.FindNeuronsResponse:
    """One page, with the texts of every token that it names."""
    named = chain([found.token.id], *named_tokens(found.projections))
    return neurons_pb2.FindNeuronsResponse(
        neurons=_hits(found),
        next_page_token=next_page_token,
        tokens=TokenTexts(read_token).texts(named),
        token_id=found.token.id,
        depth=found.depth,
        total=found.total,
        provenance=provenance_message(found.provenance),
    )


def _hits(found: FoundNeurons) -> Iterator[neurons_pb2.NeuronHit]:
    columns = zip(
        found.layers.tolist(),
        found.neurons.tolist(),
        found.experts.tolist(),
        found.ranks.tolist(),
        found.projections.target_logits[:, 0].tolist(),
        projections(found.projections),
        strict=True,
    )
    for layer, neuron, expert, rank, logit, value in columns:
        yield neurons_pb2.NeuronHit(
            layer=layer,
            neuron=neuron,
            expert=None if expert < 0 else expert,
            rank=rank,
            logit=logit,
            value=value,
        )

"""The answer to FindNeurons as a message."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from januslens.v1 import neurons_pb2
from januslens_server.results import FoundNeurons
from januslens_server.rpc.encode.shared import (
    ReadToken,
    TokenTexts,
    named_tokens,
    projections,
    provenance_message,
)


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

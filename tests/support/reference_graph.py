"""Records of the flow graph that a trace must show, and what all of its blocks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from januslens_server.results import EdgeKind
from januslens_server.specs import Selection
from tests.support.reference_model import ReferenceModel

EdgeKey = tuple[str, str, EdgeKind]


@dataclass(frozen=True)
class ExpectedNode:
    """`vector` `[d]`; a neuron's `activation`; junctions are not `projected`."""

    vector: Tensor
    activation: float | None = None
    projected: bool = True


@dataclass(frozen=True)
class ExpectedEdge:
    """`share` and `logit_contribution` belong to parts of a sum only."""

    weight: float
    share: float | None = None
    attention: float | None = None
    logit_contribution: float | None = None


@dataclass
class ExpectedGraph:
    """Nodes by id and edges by their ends and kind."""

    nodes: dict[str, ExpectedNode] = field(default_factory=dict)
    edges: dict[EdgeKey, ExpectedEdge] = field(default_factory=dict)

    def edge(
        self,
        source: str,
        target: str,
        kind: EdgeKind,
        weight: float,
        attention: float | None = None,
    ) -> None:
        self.edges[source, target, kind] = ExpectedEdge(weight, attention=attention)


class PromptOracle:
    """One prompt's forward pass, and what a part of it adds to its target's logit."""

    def __init__(
        self, model: ReferenceModel, ids: Sequence[int], targets: Mapping[int, int] | None = None
    ) -> None:
        """`targets` are the tokens by position that contributions go to, else the predictions."""
        self.model, self.length = model, len(ids)
        self.passes = model.run(ids)
        self.residual = self.passes[-1].block_output
        self.logits = model.unembed(model.final_norm(self.residual))
        self.targets = dict(enumerate(self.logits.argmax(-1).tolist())) | dict(targets or {})

    def constant(self, position: int) -> float:
        """What norm bias and head bias give the target's logit."""
        norm, zero = self.model.final_norm, torch.zeros(self.residual.shape[1]).double()
        bias = zero if norm.bias is None else norm.bias
        return float(self.model.unembed(bias)[self.targets[position]])

    def contribution(self, part: Tensor, position: int) -> float:
        """<N(part), U_t>, N the final norm's linear part with its scale at this position."""
        norm = self.model.final_norm
        scale = norm.scale(self.residual[position])
        row = self.model.unembedding[self.targets[position]]
        return float(norm.linear(part, scale) @ row)


def add_up(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).sum(0)


def ranked(scores: Mapping[int, float]) -> list[int]:
    """Keys by score, largest first; the lower one among equals."""
    return sorted(scores, key=lambda key: (-scores[key], key))


def extremes(scores: Mapping[int, float], selection: Selection) -> list[int]:
    """VISIT's neurons: the largest scores (0: all), then the smallest, each once."""
    top = ranked(scores)[: selection.top_neurons or len(scores)]
    smallest = sorted(scores, key=lambda key: (scores[key], key))[: selection.bottom_neurons]
    return top + [i for i in smallest if i not in set(top)]

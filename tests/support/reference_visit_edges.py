"""The edges of a recorded VISIT graph and what their drawing widths say in model units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from januslens_server.results import EdgeKind
from tests.support.reference_collect import Traced
from tests.support.reference_goldens import Golden
from tests.support.reference_graph import EdgeKey
from tests.support.reference_visit import VisitErrors, VisitNodes

# Widths are made of figures that were rounded to three decimals first.
ROUNDING = 1e-3
# The least width that the program draws.
FLOOR = 0.51

Record = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """An edge of ours, the size of its weight and by how much rounding moved that.

    A weight of None is not recorded; `at_most` marks one that was raised to the drawn minimum.
    """

    key: EdgeKey
    weight: float | None
    rounding: float = ROUNDING
    at_most: bool = False


class VisitEdges:
    """Translates recorded edges; those of left-out nodes have no counterpart."""

    def __init__(self, golden: Golden) -> None:
        self.visit = VisitNodes(golden)
        self.config = golden.data["config"]
        self.edges: list[Record] = golden.data["edges"]

    def expected(self) -> Iterator[Expected]:
        translate: dict[str, Callable[[Record, Record, Record], Iterator[Expected]]] = {
            "layernorm1": self._first_norm,
            "layernorm2": self._norm,
            "identity_attn": self._nothing,
            "identity_mlp": self._nothing,
            "qkv_projection": self._projections,
            "head_split": self._splits,
            "head_concat": self._concat,
            "attention_score_qk": self._attention,
            "attention_score_kv": self._attention,
            "attention_weighted_value": self._recalled,
            "wo_activation": self._fired,
            "mlp_key_in": self._fired,
            "mlp_activation": self._activated,
            "attn_bias_in": self._nothing,
            "mlp_bias_in": self._nothing,
            "mlp_bias_invisible": self._nothing,
        }
        nodes = self.visit.nodes
        for edge in self.edges:
            source, target = nodes[edge["s"]], nodes[edge["t"]]
            yield from translate.get(edge["m"], self._part)(edge, source, target)

    def _key(self, source: Record, target: Record, kind: EdgeKind) -> EdgeKey:
        return self.visit.id(source), self.visit.id(target), kind

    def _nothing(self, _edge: Record, _source: Record, _target: Record) -> Iterator[Expected]:
        yield from ()

    def _part(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        weight = edge.get("w_source_norm", edge["w"])
        yield Expected(self._key(source, target, EdgeKind.PART), weight)

    def _norm(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        weight = edge.get("w_source_norm", edge["w"])
        yield Expected(self._key(source, target, EdgeKind.NORM), weight)

    def _first_norm(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        """In a parallel block both sublayers read the one norm."""
        yield from self._norm(edge, source, target)
        if target["kind"] == "block_input_after_LN":
            mlp_input = {"kind": "mlp_input", "layer": target["layer"]}
            yield from self._norm(edge, source, mlp_input)

    def _projections(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        start = self.visit.id(source)
        for kind in ("QUERY", "KEY", "VALUE"):
            end = self.visit.id(target, kind)
            yield Expected((start, end, EdgeKind.PROJECT), edge["w"])

    def _splits(self, _edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        """The width is that of the query alone; every part has its own recorded norm."""
        for letter, kind in (("q", "QUERY"), ("k", "KEY"), ("v", "VALUE")):
            start, end = self.visit.id(source, kind), self.visit.id(target, kind)
            record = target[letter].get("corrected", target[letter])
            wrong = letter == "v" and self.visit.output_is_wrong
            yield Expected((start, end, EdgeKind.SPLIT), None if wrong else record["norm"])

    def _concat(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        factor = self.config["factor_head_output"]
        wrong = self.visit.output_is_wrong
        key = self._key(source, target, EdgeKind.PART)
        yield Expected(key, None if wrong else edge["w"] / factor)

    def _attention(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        kind = EdgeKind.RECALL if edge["m"] == "attention_score_kv" else EdgeKind.ATTEND
        key = self.visit.id(source, "QUERY"), self.visit.id(target), kind
        yield Expected(key, target["attn"], rounding=1e-5)

    def _recalled(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        key = self._key(source, target, EdgeKind.PART)
        factor = self.config["factor_for_memory_to_head_values"]
        rounding = ROUNDING * (source["norm"] + 1)
        if self.visit.output_is_wrong:
            yield Expected(key, None)
        else:
            yield Expected(key, edge["w"] / factor, rounding, at_most=edge["w"] <= FLOOR)

    def _fired(self, _edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        """An input and what it activates; the width is a constant."""
        key = self._key(source, target, EdgeKind.ACTIVATE)
        yield Expected(key, abs(target["act"]), rounding=1e-5)

    def _activated(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        factor = self.config["factor_weight_mlp_key_value_link"]
        yield Expected(self._key(source, target, EdgeKind.ACTIVATE), edge["w"] / factor)


def compare_edges(golden: Golden, traced: Traced, errors: VisitErrors) -> None:
    """Edge set and weights; raises AssertionError where an edge is missing or too many."""
    visit = VisitNodes(golden)
    shared = {
        key: edge
        for key, edge in traced.edges.items()
        if not any(visit.is_ours_alone(traced.nodes[end].node.kind) for end in key[:2])
    }
    expected = {
        wanted.key: wanted
        for wanted in VisitEdges(golden).expected()
        if not (visit.output_is_wrong and "/ATTENTION_NEURON/" in "".join(wanted.key[:2]))
    }
    assert shared.keys() == expected.keys()
    for key, wanted in expected.items():
        errors.edges += 1
        if wanted.weight is None:
            errors.left_out += 1
            continue
        found = abs(shared[key].weight)
        over = abs(found - wanted.weight) - wanted.rounding
        if wanted.at_most:
            over = found - wanted.weight - wanted.rounding
        errors.widen("weight", max(over, 0.0) / max(wanted.weight, 1.0))

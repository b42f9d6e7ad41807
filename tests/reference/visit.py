"""Compare a trace with a recorded VISIT graph: match nodes and edges, then compare their numbers.

Defects of the recording program are excluded: it transposes the query (GPT-2) or the key (the
others), so the data also holds `corrected` vectors; under rotary embeddings its memory keys lack
the inverse rotation, so these are compared with the reference only; its FF1-bias node and its
projection of the unprojected concatenation have no counterpart in our graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from januslens_server.results import EdgeKind, NodeKind
from januslens_server.specs import Selection, TraceSpec
from tests.reference.goldens import VOCABULARY, Golden, assert_same_ids
from tests.reference.graph import EdgeKey
from tests.reference.traces import Traced

Record = dict[str, Any]

# The part of our id after layer and position; `kind` is one of QUERY, KEY, VALUE.
NAMES = {
    "attn_input": "ATTENTION_INPUT",
    "block_input_after_LN": "ATTENTION_INPUT",
    "attn_output": "ATTENTION_OUTPUT",
    "residual_after_attn": "RESIDUAL_MID",
    "mlp_input": "MLP_INPUT",
    "mlp_output": "MLP_OUTPUT",
    "block_output": "BLOCK_OUTPUT",
    "qkv_full": "{kind}",
    "head_qkv": "HEAD_{kind}/h{head}",
    "head_output": "HEAD_OUTPUT/h{head}",
    "mem_key": "MEMORY_KEY/h{head}/s{pos}",
    "mem_value": "MEMORY_VALUE/h{head}/s{pos}",
    "concat_heads": "ATTENTION_CONCAT",
    "wo_neuron": "ATTENTION_NEURON/n{neuron}",
    "attn_bias": "ATTENTION_BIAS",
    "mlp_key": "MLP_KEY/n{neuron}",
    "mlp_value": "MLP_VALUE/n{neuron}",
    "mlp_bias2": "MLP_BIAS",
}
# The program does not support gates: its key is the column of the up map.
GATED_NAMES = NAMES | {"mlp_key": "MLP_UP/n{neuron}"}
LEFT_OUT = {"mlp_bias1"}
ROTARY = {"llama", "gptj"}


@dataclass
class VisitErrors:
    """The amount compared, and the largest differences.

    `vector`, `norm`, `probability`, `activation` and `weight` are relative, `weight` to at least 1;
    `entropy_bits` is absolute.
    """

    nodes: int = 0
    readings: int = 0
    edges: int = 0
    left_out: int = 0
    vector: float = 0.0
    norm: float = 0.0
    probability: float = 0.0
    entropy_bits: float = 0.0
    activation: float = 0.0
    weight: float = 0.0
    seen: set[str] = field(default_factory=set)

    def widen(self, name: str, error: float) -> None:
        assert not np.isnan(error)
        setattr(self, name, max(getattr(self, name), error))


def spec_of(golden: Golden) -> TraceSpec:
    """Return the request that gives the same graph."""
    config = golden.data["config"]
    return TraceSpec(
        tuple(golden.data["input_ids"]),
        target=(golden.data["target_id"],),
        layers=tuple(golden.data["layers"]),
        positions=(golden.data["position"],),
        selection=Selection(
            heads=config["n_heads_to_add"],
            memory_values_per_head=config["n_values_per_head"],
            top_neurons=config["number_of_top_neurons"],
            bottom_neurons=config["number_of_bottom_neurons"],
        ),
        include_vectors=True,
    )


class VisitNodes:
    """Translates the nodes of a recorded graph to our ids."""

    def __init__(self, golden: Golden) -> None:
        self.golden, self.family = golden, golden.data["arch"]
        self.position = golden.data["position"]
        self.nodes: list[Record] = golden.data["nodes"]
        # One recording has W_O transposed, so everything computed with W_O is wrong in it.
        self.output_is_wrong = golden.data["variant"] == "as_shipped"

    def id(self, node: Record, kind: str = "") -> str:
        """Return our id of a recorded node; `kind` is QUERY, KEY or VALUE."""
        if node["kind"] == "block_input":
            before = f"L{node['layer'] - 1}/p{self.position}/BLOCK_OUTPUT"
            return before if node["layer"] else f"p{self.position}/BLOCK_INPUT"
        names = GATED_NAMES if self.family == "llama" else NAMES
        coordinates = {name: node.get(name) for name in ("head", "pos", "neuron")}
        rest = names[node["kind"]].format(kind=kind, **coordinates)
        return f"L{node['layer']}/p{self.position}/{rest}"

    def readings(self) -> Iterator[tuple[str, Record]]:
        """Return our ids with the readings that their nodes must have."""
        for node in self.nodes:
            if node["kind"] in {"qkv_full", "head_qkv"}:
                for letter, kind in (("q", "QUERY"), ("k", "KEY"), ("v", "VALUE")):
                    if not (letter == "v" and self.output_is_wrong):
                        yield self.id(node, kind), node[letter].get("corrected", node[letter])
            elif self._is_read(node["kind"]):
                yield self.id(node), node.get("corrected", node)

    def _is_read(self, kind: str) -> bool:
        wrong = {"head_output", "mem_value", "wo_neuron"} if self.output_is_wrong else set()
        rotated = {"mem_key"} if self.family in ROTARY else set()
        return kind not in {"concat_heads"} | LEFT_OUT | wrong | rotated

    def ids(self) -> set[str]:
        """Return the ids that our graph must have, except for the kinds of `is_ours_alone`."""
        return {
            self.id(node, kind)
            for node in self.nodes
            if node["kind"] not in LEFT_OUT
            for kind in ("QUERY", "KEY", "VALUE")
        }

    def is_ours_alone(self, kind: NodeKind) -> bool:
        """Whether the recording program omits this kind of node."""
        gate = {NodeKind.MLP_KEY} if self.family == "llama" else set()
        unknown = {NodeKind.OTHER, NodeKind.FINAL_NORM, NodeKind.PREDICTION} | gate
        wrong = {NodeKind.ATTENTION_NEURON} if self.output_is_wrong else set()
        return kind in unknown | wrong


def compare_nodes(golden: Golden, traced: Traced, errors: VisitErrors) -> None:
    """Compare nodes, readings, vectors and activations; AssertionError if ids or ranks differ."""
    visit = VisitNodes(golden)
    shared = {i for i, n in traced.nodes.items() if not visit.is_ours_alone(n.node.kind)}
    neurons = {i for i in visit.ids() if "/ATTENTION_NEURON/" in i and visit.output_is_wrong}
    assert shared == visit.ids() - neurons
    errors.nodes += len(shared)
    for node_id, record in visit.readings():
        _compare_reading(golden, traced, node_id, record, errors)
    for node in visit.nodes:
        if "act" in node and visit.id(node) in traced.nodes:
            found = traced.nodes[visit.id(node)].activation
            errors.widen("activation", abs(found - node["act"]) / max(abs(node["act"]), 1.0))


def _compare_reading(
    golden: Golden, traced: Traced, node_id: str, record: Record, errors: VisitErrors
) -> None:
    node, table = traced.nodes[node_id], traced.table
    assert node.row is not None
    errors.readings += 1
    errors.seen.add(node.node.kind.name)
    ends = [("top", table.top_ids, table.top_probabilities)]
    if "bot" in record:
        ends.append(("bot", table.bottom_ids, table.bottom_probabilities))
    for name, ids, probabilities in ends:
        wanted = record[f"{name}_p"]
        assert_same_ids(ids[node.row].tolist(), record[name], wanted)
        errors.widen("probability", relative(probabilities[node.row], wanted))
    rank = int(table.target_ranks[node.row, 0])
    assert rank + 1 == record["rank_target"]
    assert 0 <= rank < VOCABULARY
    chance = table.target_probabilities[node.row, 0]
    errors.widen("probability", relative(chance, record["p_target"]))
    errors.widen("norm", relative(node.norm, record["norm"]))
    if "H" in record:
        bits = abs(float(table.entropy_bits[node.row]) - record["H"])
        errors.widen("entropy_bits", bits)
    if record.get("vec") is not None:
        wanted = golden.arrays["vectors"][record["vec"]]
        assert node.vector is not None
        difference = np.linalg.norm(node.vector - wanted) / np.linalg.norm(wanted)
        errors.widen("vector", float(difference))


def relative(found: Any, wanted: Any) -> float:
    return float(np.max(np.abs(np.asarray(found) - wanted) / np.abs(wanted)))


# Widths are computed from figures rounded to three decimals.
ROUNDING = 1e-3
# The minimum width that the program draws.
FLOOR = 0.51


@dataclass(frozen=True)
class Expected:
    """An edge of our graph, its expected weight, and the effect of rounding on the weight.

    A weight of None was not recorded; `at_most` marks a weight that was raised to the drawn
    minimum.
    """

    key: EdgeKey
    weight: float | None
    rounding: float = ROUNDING
    at_most: bool = False


class VisitEdges:
    """Translates recorded edges, except for those of nodes without a counterpart."""

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
        """In a parallel block both sublayers read the same norm."""
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
        """The width is that of the query alone; each part has its own recorded norm."""
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
        """Return the edges from an input to the neurons that it activates, of constant width."""
        key = self._key(source, target, EdgeKind.ACTIVATE)
        yield Expected(key, abs(target["act"]), rounding=1e-5)

    def _activated(self, edge: Record, source: Record, target: Record) -> Iterator[Expected]:
        factor = self.config["factor_weight_mlp_key_value_link"]
        yield Expected(self._key(source, target, EdgeKind.ACTIVATE), edge["w"] / factor)


def compare_edges(golden: Golden, traced: Traced, errors: VisitErrors) -> None:
    """Compare edges and weights; raises AssertionError if an edge is missing or unexpected."""
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

"""A trace against a recorded VISIT graph: which node is which, and what must be equal.

The recording program's defects are left out as the definitions have it: it transposes the query
(GPT-2) or the key (the others), for which the data holds the `corrected` reading; under rotary
embeddings its memory keys lack the inverse rotation, so these are held to the reference alone;
its FF1-bias node and its reading of the unprojected concatenation are no part of our graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from januslens_server.results import NodeKind
from januslens_server.specs import Selection, TraceSpec
from tests.support.reference_collect import Traced
from tests.support.reference_goldens import VOCABULARY, Golden, assert_same_ids

Record = dict[str, Any]

# What follows layer and position in our id; `kind` is one of QUERY, KEY, VALUE.
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
# The program knows no gate: its key is the up map's column.
GATED_NAMES = NAMES | {"mlp_key": "MLP_UP/n{neuron}"}
LEFT_OUT = {"mlp_bias1"}
ROTARY = {"llama", "gptj"}


@dataclass
class VisitErrors:
    """How much was compared, and the largest differences: `vector`, `norm`, `probability`,
    `activation` and `weight` relative, the last to at least 1, `entropy_bits` absolute."""

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
    """The request that shows the same graph."""
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
    """The ids that a recorded graph's nodes have with us."""

    def __init__(self, golden: Golden) -> None:
        self.golden, self.family = golden, golden.data["arch"]
        self.position = golden.data["position"]
        self.nodes: list[Record] = golden.data["nodes"]
        # Recorded once with W_O transposed: nothing that goes through it is right there.
        self.output_is_wrong = golden.data["variant"] == "as_shipped"

    def id(self, node: Record, kind: str = "") -> str:
        """Our id of a recorded node; `kind` says which of QUERY, KEY, VALUE."""
        if node["kind"] == "block_input":
            before = f"L{node['layer'] - 1}/p{self.position}/BLOCK_OUTPUT"
            return before if node["layer"] else f"p{self.position}/BLOCK_INPUT"
        names = GATED_NAMES if self.family == "llama" else NAMES
        coordinates = {name: node.get(name) for name in ("head", "pos", "neuron")}
        rest = names[node["kind"]].format(kind=kind, **coordinates)
        return f"L{node['layer']}/p{self.position}/{rest}"

    def readings(self) -> Iterator[tuple[str, Record]]:
        """Our ids with the readings that they must show."""
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
        """Every node that we must show, and no other, but for those in `is_ours_alone`."""
        return {
            self.id(node, kind)
            for node in self.nodes
            if node["kind"] not in LEFT_OUT
            for kind in ("QUERY", "KEY", "VALUE")
        }

    def is_ours_alone(self, kind: NodeKind) -> bool:
        """What the recording program does not show."""
        gate = {NodeKind.MLP_KEY} if self.family == "llama" else set()
        unknown = {NodeKind.OTHER, NodeKind.FINAL_NORM, NodeKind.PREDICTION} | gate
        wrong = {NodeKind.ATTENTION_NEURON} if self.output_is_wrong else set()
        return kind in unknown | wrong


def compare_nodes(golden: Golden, traced: Traced, errors: VisitErrors) -> None:
    """Node set, readings, vectors, activations; raises AssertionError for ids and ranks."""
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

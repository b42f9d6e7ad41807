"""The flow graph that a trace must return, computed from the definitions in docs/semantics.md.

Query and key vectors are gradients, taken by autograd, of the dot product that the model computes.
This checks the server's closed formula against its definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from januslens_server.results import EdgeKind, NodeKind
from januslens_server.specs import Selection
from tests.reference.model import BlockPass, ReferenceBlock, ReferenceModel

EdgeKey = tuple[str, str, EdgeKind]


@dataclass(frozen=True)
class ExpectedNode:
    """`vector` is `[d]`; only neurons have an `activation`; junctions are not `projected`."""

    vector: Tensor
    activation: float | None = None
    projected: bool = True


@dataclass(frozen=True)
class ExpectedEdge:
    """An edge; only parts of a sum have `share` and `logit_contribution`."""

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
    """The forward pass of one prompt, and the contribution of a part to its target's logit."""

    def __init__(
        self, model: ReferenceModel, ids: Sequence[int], targets: Mapping[int, int] | None = None
    ) -> None:
        """`targets` are the tokens of contributions by position; None means the predictions."""
        self.model, self.length = model, len(ids)
        self.passes = model.run(ids)
        self.residual = self.passes[-1].block_output
        self.logits = model.unembed(model.final_norm(self.residual))
        self.targets = dict(enumerate(self.logits.argmax(-1).tolist())) | dict(targets or {})

    def constant(self, position: int) -> float:
        """The contribution of norm bias and head bias to the target's logit."""
        norm, zero = self.model.final_norm, torch.zeros(self.residual.shape[1]).double()
        bias = zero if norm.bias is None else norm.bias
        return float(self.model.unembed(bias)[self.targets[position]])

    def contribution(self, part: Tensor, position: int) -> float:
        """<N(part), U_t>; N is the final norm's linear part with its scale at this position."""
        norm = self.model.final_norm
        scale = norm.scale(self.residual[position])
        row = self.model.unembedding[self.targets[position]]
        return float(norm.linear(part, scale) @ row)


def add_up(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).sum(0)


def ranked(scores: Mapping[int, float]) -> list[int]:
    """Return the keys by score, largest first; ties are broken by the lower key."""
    return sorted(scores, key=lambda key: (-scores[key], key))


def extremes(scores: Mapping[int, float], selection: Selection) -> list[int]:
    """Return VISIT's neurons: the largest scores (0: all), then the smallest, each once."""
    top = ranked(scores)[: selection.top_neurons or len(scores)]
    smallest = sorted(scores, key=lambda key: (scores[key], key))[: selection.bottom_neurons]
    return top + [i for i in smallest if i not in set(top)]


class BlockOracle:
    """One block at one position."""

    def __init__(
        self,
        oracle: PromptOracle,
        graph: ExpectedGraph,
        layer: int,
        position: int,
        selection: Selection,
    ) -> None:
        self.oracle, self.graph = oracle, graph
        self.layer, self.position, self.selection = layer, position, selection
        self.block: ReferenceBlock = oracle.model.blocks[layer]
        self.passed: BlockPass = oracle.passes[layer]
        self.sources = self.block.sources(position)

    def name(self, rest: str) -> str:
        return f"L{self.layer}/p{self.position}/{rest}"

    def at(self, states: Tensor) -> Tensor:
        return states[self.position]

    def node(self, rest: str, vector: Tensor, activation: float | None = None) -> str:
        name = self.name(rest)
        self.graph.nodes[name] = ExpectedNode(vector, activation)
        return name

    def part(
        self, source: str, target: str, part: Tensor, total: Tensor, attention: float | None = None
    ) -> None:
        size = float(total @ total)
        self.graph.edges[source, target, EdgeKind.PART] = ExpectedEdge(
            weight=float(part.norm()),
            share=float(part @ total) / size if size else None,
            attention=attention,
            logit_contribution=self.oracle.contribution(part, self.position),
        )

    def add(self, below: int | None) -> None:
        """Add the residual stream, with attention and MLP."""
        residual = self.at(self.passed.block_input)
        source = self._input(residual, below)
        attention_input = self._normed("ATTENTION_INPUT", source, residual)
        attention = self._attention(attention_input)
        terms = {source: residual, attention: self.at(self.passed.attention_output)}
        if self.passed.residual_mid is not None:
            residual = self.at(self.passed.residual_mid)
            source = self._sum("RESIDUAL_MID", residual, terms)
            terms = {source: residual}
        mlp = self._mlp(self._normed("MLP_INPUT", source, residual))
        terms[mlp] = self.at(self.passed.mlp_output)
        self._sum("BLOCK_OUTPUT", self.at(self.passed.block_output), terms)

    def _input(self, residual: Tensor, below: int | None) -> str:
        name = f"p{self.position}/BLOCK_INPUT"
        if self.layer:
            name = f"L{self.layer - 1}/p{self.position}/BLOCK_OUTPUT"
        if below is None or below < self.layer - 1:
            self.graph.nodes[name] = ExpectedNode(residual)
        if below is not None and below < self.layer - 1:
            before = f"L{below}/p{self.position}/BLOCK_OUTPUT"
            self.graph.edge(before, name, EdgeKind.GAP, float(residual.norm()))
        return name

    def _normed(self, kind: str, source: str, before: Tensor) -> str:
        states = {
            "ATTENTION_INPUT": self.passed.attention_input,
            "MLP_INPUT": self.passed.mlp_input,
        }
        name = self.node(kind, self.at(states[kind]))
        self.graph.edge(source, name, EdgeKind.NORM, float(before.norm()))
        return name

    def _sum(self, kind: str, total: Tensor, terms: Mapping[str, Tensor]) -> str:
        name = self.node(kind, total)
        for source, term in terms.items():
            self.part(source, name, term, total)
        return name

    def _attention(self, attention_input: str) -> str:
        heads = range(self.block.n_heads)
        size = self.at(self.passed.concat).shape[0] // self.block.n_heads
        slices = {h: self.at(self.passed.concat)[h * size : (h + 1) * size] for h in heads}
        kept = ranked({h: float(slices[h].norm()) for h in heads})
        kept = kept[: self.selection.heads or len(kept)]
        queries = self._projections(attention_input, kept)
        outputs = {h: slices[h] @ self.block.output_rows(h) for h in heads}
        for head in kept:
            self._memories(head, queries[head], outputs[head])
        concat = self._concat(outputs, kept)
        return self._neurons(concat)

    def _projections(self, attention_input: str, kept: Sequence[int]) -> dict[int, str]:
        """Add QUERY, KEY, VALUE and those of the kept heads; return the ids of HEAD_QUERY."""
        p, heads = self.position, range(self.block.n_heads)
        vectors = {
            "QUERY": {h: self.pull_back_query(h) for h in heads},
            "KEY": {h: self.pull_back_key(h, p) for h in heads},
            "VALUE": {h: self.memory_value(h, p) for h in heads},
        }
        size = float(self.at(self.passed.attention_input).norm())
        for kind, by_head in vectors.items():
            whole = self.node(kind, torch.stack(list(by_head.values())).sum(0))
            self.graph.edge(attention_input, whole, EdgeKind.PROJECT, size)
            for head in kept:
                name = self.node(f"HEAD_{kind}/h{head}", by_head[head])
                self.graph.edge(whole, name, EdgeKind.SPLIT, float(by_head[head].norm()))
        return {head: self.name(f"HEAD_QUERY/h{head}") for head in kept}

    def pull_back_key(self, head: int, source: int) -> Tensor:
        """MEMORY_KEY: the gradient of q k for this source with respect to the query's input."""
        x = self.at(self.passed.attention_input).clone().requires_grad_()
        query = self.block.asked(head, x, self.position, self.oracle.length)
        score = query @ self.passed.keys[head, source]
        return torch.autograd.grad(score, x)[0]

    def pull_back_query(self, head: int) -> Tensor:
        """HEAD_QUERY: the gradient of q k at s = p with respect to the key's input."""
        x = self.at(self.passed.attention_input).clone().requires_grad_()
        key = self.block.offered(head, x, self.position, self.oracle.length)
        score = self.passed.queries[head, self.position] @ key
        return torch.autograd.grad(score, x)[0]

    def memory_value(self, head: int, source: int) -> Tensor:
        return self.passed.values[head, source] @ self.block.output_rows(head)

    def _memories(self, head: int, query: str, total: Tensor) -> None:
        attended = {s: float(self.passed.pattern[head, self.position, s]) for s in self.sources}
        kept = ranked(attended)[: self.selection.memory_values_per_head or len(attended)]
        output = self.node(f"HEAD_OUTPUT/h{head}", total)
        for s in kept:
            value = self.memory_value(head, s)
            key_name = self.node(f"MEMORY_KEY/h{head}/s{s}", self.pull_back_key(head, s))
            value_name = self.node(f"MEMORY_VALUE/h{head}/s{s}", value)
            weight = attended[s]
            self.graph.edge(query, key_name, EdgeKind.ATTEND, weight, weight)
            self.graph.edge(key_name, value_name, EdgeKind.RECALL, weight, weight)
            self.part(value_name, output, weight * value, total, weight)
        left = {s: weight for s, weight in attended.items() if s not in kept}
        if left:
            rest = add_up([w * self.memory_value(head, s) for s, w in left.items()])
            other = self.node(f"OTHER/HEAD_OUTPUT/h{head}", rest)
            self.part(other, output, rest, total, sum(left.values()))

    def _concat(self, outputs: Mapping[int, Tensor], kept: Sequence[int]) -> str:
        total = add_up(list(outputs.values()))
        concat = self.node("ATTENTION_CONCAT", total)
        self.graph.nodes[concat] = replace(self.graph.nodes[concat], projected=False)
        for head in kept:
            self.part(self.name(f"HEAD_OUTPUT/h{head}"), concat, outputs[head], total)
        left = [vector for head, vector in outputs.items() if head not in kept]
        if left:
            rest = add_up(left)
            self.part(self.node("OTHER/ATTENTION_CONCAT", rest), concat, rest, total)
        return concat

    def _neurons(self, concat: str) -> str:
        """Add ATTENTION_NEURON, OTHER and ATTENTION_BIAS to ATTENTION_OUTPUT."""
        z, output = self.at(self.passed.concat), self.block.output
        name = self.node("ATTENTION_OUTPUT", self.at(self.passed.attention_output))
        for i in self._rows("ATTENTION", z, output.weight, output.bias, name):
            neuron = self.name(f"ATTENTION_NEURON/n{i}")
            self.graph.edge(concat, neuron, EdgeKind.ACTIVATE, float(z[i]))
        return name

    def _mlp(self, mlp_input: str) -> str:
        activations, ff2 = self.at(self.passed.neurons), self.block.ff2
        name = self.node("MLP_OUTPUT", self.at(self.passed.mlp_output))
        columns = {"MLP_KEY": self.block.ff1} | (
            {} if self.block.up is None else {"MLP_UP": self.block.up}
        )
        for j in self._rows("MLP", activations, ff2.weight, ff2.bias, name):
            fired = float(activations[j])
            for kind, projection in columns.items():
                key = self.node(f"{kind}/n{j}", projection.weight[:, j], fired)
                self.graph.edge(mlp_input, key, EdgeKind.ACTIVATE, fired)
                self.graph.edge(key, self.name(f"MLP_VALUE/n{j}"), EdgeKind.ACTIVATE, fired)
        return name

    def _rows(
        self, sublayer: str, activations: Tensor, rows: Tensor, bias: Tensor | None, target: str
    ) -> list[int]:
        """Add the terms of `activations @ rows + bias`; return the neurons that have nodes."""
        kind = {"ATTENTION": NodeKind.ATTENTION_NEURON, "MLP": NodeKind.MLP_VALUE}[sublayer].name
        total = self.graph.nodes[target].vector
        scores = dict(enumerate((activations * rows.norm(dim=1)).tolist()))
        kept = extremes(scores, self.selection)
        for i in kept:
            name = self.node(f"{kind}/n{i}", rows[i], float(activations[i]))
            self.part(name, target, activations[i] * rows[i], total)
        left = sorted(scores.keys() - set(kept))
        if left:
            rest = activations[left] @ rows[left]
            self.part(self.node(f"OTHER/{sublayer}_OUTPUT", rest), target, rest, total)
        if bias is not None:
            self.part(self.node(f"{sublayer}_BIAS", bias), target, bias, total)
        return kept


def expected_graph(
    oracle: PromptOracle, layers: Sequence[int], positions: Sequence[int], selection: Selection
) -> ExpectedGraph:
    """Every node and edge of these layers and positions, both ascending."""
    graph = ExpectedGraph()
    for position in positions:
        below = None
        for layer in layers:
            BlockOracle(oracle, graph, layer, position, selection).add(below)
            below = layer
        if below == len(oracle.passes) - 1:
            _add_top(oracle, graph, position)
    return graph


def _add_top(oracle: PromptOracle, graph: ExpectedGraph, position: int) -> None:
    """Add FINAL_NORM and PREDICTION, which have the same vector, the unembedding's input."""
    residual = oracle.residual[position]
    normed = oracle.model.final_norm(residual)
    source = f"L{len(oracle.passes) - 1}/p{position}/BLOCK_OUTPUT"
    norm, prediction = f"p{position}/FINAL_NORM", f"p{position}/PREDICTION"
    graph.nodes |= {norm: ExpectedNode(normed), prediction: ExpectedNode(normed)}
    graph.edge(source, norm, EdgeKind.NORM, float(residual.norm()))
    graph.edge(norm, prediction, EdgeKind.PROJECT, float(normed.norm()))

"""One block at one position: the residual stream, with attention and MLP hung into it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.attention_flow import add_attention
from januslens_server.graph.flow import Flow, FlowBuilder
from januslens_server.graph.mlp_flow import add_mlp
from januslens_server.graph.weighted_rows import Result
from januslens_server.graph.weights import BlockWeights, Finish
from januslens_server.results import EdgeKind, Node, NodeKind
from januslens_server.specs import Selection


def input_node(layer: int, position: int) -> Node:
    """The input of block `layer`: the output of the block below, one node with one id."""
    if layer == 0:
        return Node(NodeKind.BLOCK_INPUT, position)
    return Node(NodeKind.BLOCK_OUTPUT, position, layer - 1)


def block_flow(
    layer: int,
    position: int,
    acts: LayerActivations,
    weights: BlockWeights,
    selection: Selection,
    direction: torch.Tensor | None,
    below: int | None,
) -> Flow:
    """Everything between the block's input and output at one position.

    `below` is the layer sent before this one: the input node is added unless it is the one
    right below, and joined by a GAP edge if layers between were not asked for.
    """
    flow = FlowBuilder(layer, position, direction)
    residual = acts.block_input[position].float()
    source = _add_input(flow, residual, below)
    attention = _add_attention_sublayer(flow, source, residual, acts, weights, selection)
    terms = {source: residual, attention: acts.attention_output[position].float()}
    if acts.residual_mid is not None:
        middle = acts.residual_mid[position].float()
        source, residual = _add_sum(flow, NodeKind.RESIDUAL_MID, middle, terms), middle
        terms = {source: middle}
    mlp = _add_mlp_sublayer(flow, source, residual, acts, weights, selection)
    terms[mlp] = acts.mlp_output[position].float()
    _add_sum(flow, NodeKind.BLOCK_OUTPUT, acts.block_output[position].float(), terms)
    return flow.build()


def _add_input(flow: FlowBuilder, residual: torch.Tensor, below: int | None) -> str:
    node = input_node(flow.layer, flow.position)
    if below is not None and below == flow.layer - 1:
        return node.id
    flow.nodes([node], residual[None])
    if below is not None:
        before = Node(NodeKind.BLOCK_OUTPUT, flow.position, below)
        flow.edges(EdgeKind.GAP, [before.id], [node.id], residual.norm()[None])
    return node.id


def _add_attention_sublayer(
    flow: FlowBuilder,
    source: str,
    residual: torch.Tensor,
    acts: LayerActivations,
    weights: BlockWeights,
    selection: Selection,
) -> str:
    """Norm, attention, and what it adds to the residual; gives the latter's id."""
    if weights.attention_prenorm:
        normed = acts.attention_input[flow.position]
        source = _add_normed(flow, NodeKind.ATTENTION_INPUT, source, residual, normed)
    added = Result(NodeKind.ATTENTION_OUTPUT, acts.attention_output[flow.position].float())
    if weights.attention.finish is None or acts.attention_sum is None:
        return add_attention(flow, source, acts, weights.attention, selection, added)
    raw = Result(NodeKind.ATTENTION_SUM, acts.attention_sum[flow.position].float())
    inside = flow.before(weights.attention.finish, raw.vector)
    total = add_attention(inside, source, acts, weights.attention, selection, raw)
    return _add_finished(flow, weights.attention.finish, total, raw, added)


def _add_mlp_sublayer(
    flow: FlowBuilder,
    source: str,
    residual: torch.Tensor,
    acts: LayerActivations,
    weights: BlockWeights,
    selection: Selection,
) -> str:
    """Norm, MLP, and what it adds to the residual; gives the latter's id."""
    if weights.mlp_prenorm:
        normed = acts.mlp_input[flow.position]
        source = _add_normed(flow, NodeKind.MLP_INPUT, source, residual, normed)
    added = Result(NodeKind.MLP_OUTPUT, acts.mlp_output[flow.position].float())
    if weights.mlp.finish is None or acts.mlp_sum is None:
        return add_mlp(flow, source, acts, weights.mlp, selection, added)
    raw = Result(NodeKind.MLP_SUM, acts.mlp_sum[flow.position].float())
    inside = flow.before(weights.mlp.finish, raw.vector)
    total = add_mlp(inside, source, acts, weights.mlp, selection, raw)
    return _add_finished(flow, weights.mlp.finish, total, raw, added)


def _add_finished(flow: FlowBuilder, finish: Finish, total: str, raw: Result, added: Result) -> str:
    """What a post-norm or multiplier makes of a sublayer's raw result."""
    node = flow.node(added.kind, added.vector)
    kind = EdgeKind.SCALE if finish.norm is None else EdgeKind.NORM
    flow.edges(kind, [total], [node], raw.vector.norm()[None])
    return node


def _add_normed(
    flow: FlowBuilder, kind: NodeKind, source: str, before: torch.Tensor, after: torch.Tensor
) -> str:
    node = flow.node(kind, after.float())
    flow.edges(EdgeKind.NORM, [source], [node], before.norm()[None])
    return node


def _add_sum(
    flow: FlowBuilder, kind: NodeKind, total: torch.Tensor, terms: Mapping[str, torch.Tensor]
) -> str:
    """A state of the residual stream `[d_model]` and the terms it is the sum of, by their ids."""
    node = flow.node(kind, total)
    flow.parts(list(terms), node, torch.stack(list(terms.values())), total)
    return node

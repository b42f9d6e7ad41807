"""Compute the demand of a Trace."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from januslens_server.graph.block_flow import COARSE_NODES, block_nodes, mixer_nodes
from januslens_server.graph.flow import STATES as STATES_WITH_GRADIENT
from januslens_server.models.resident import CostSizes, cost_sizes
from januslens_server.models.views import MixerHeads
from januslens_server.pipelines.cost import memory
from januslens_server.pipelines.cost.demand import (
    BACKWARD,
    EDGE_BYTES,
    FORWARD,
    NODE_BYTES,
    TOKEN_BYTES,
    Demand,
    lens_flops,
    pass_flops,
    reading_bytes,
    texts_bytes,
)
from januslens_server.pipelines.flows import (
    NODES_TOGETHER,
    POSITIONS_AT_ONCE,
    positions_at_once,
)
from januslens_server.pipelines.resolve import ResolvedTrace
from januslens_server.results import NodeKind
from januslens_server.specs import TraceSpec

# Kinds of nodes that need the parts of attention, or of the MLP.
OF_ATTENTION = frozenset(
    {
        NodeKind.QUERY,
        NodeKind.KEY,
        NodeKind.VALUE,
        NodeKind.HEAD_QUERY,
        NodeKind.HEAD_KEY,
        NodeKind.HEAD_VALUE,
        NodeKind.MEMORY_KEY,
        NodeKind.MEMORY_VALUE,
        NodeKind.HEAD_OUTPUT,
        NodeKind.ATTENTION_CONCAT,
        NodeKind.ATTENTION_NEURON,
        NodeKind.ATTENTION_BIAS,
        NodeKind.MIXER_HEAD,
        NodeKind.OTHER,
    }
)
OF_MLP = frozenset(
    {
        NodeKind.MLP_KEY,
        NodeKind.MLP_UP,
        NodeKind.MLP_VALUE,
        NodeKind.MLP_BIAS,
        NodeKind.OTHER,
    }
)

# States of one block and position whose vectors are built even if only their norms are sent.
STATES = 16

# Upper bound; the default graph has 1.4. Without nodes that have edges to several others, each node
# is at most a part of one sum.
EDGES_PER_NODE = 2
OF_EDGES = frozenset(
    {NodeKind.MEMORY_KEY, NodeKind.ATTENTION_CONCAT, NodeKind.MLP_KEY, NodeKind.MLP_UP}
)

# Bytes of a node's norm, activation and row.
NUMBERS = 16


def trace_demand(request: ResolvedTrace) -> Demand:
    """Return the demand of one pass, of the graphs, and of projecting their nodes."""
    spec, layers, positions = request.spec, request.layers, request.positions
    tokens, sizes = len(request.tokens), cost_sizes(request.model)
    scored = len(positions) if spec.include_checks else 1
    view = request.model.view
    coarse = len(view.limited(layers))
    beside = sum(layer in layers and bool(block.beside) for layer, block in view.known.items())
    heads = (view.mixer_heads(layer) for layer in layers)
    named = bool(spec.selection.named_heads)  # these are heads of attention
    mixers = [] if named else [found for found in heads if found is not None]
    built, shown, junctions = _nodes(sizes, spec, layers, positions, coarse, beside, mixers)
    blocks = len(layers) * len(positions)
    most = positions_at_once(spec, sizes.facts, tokens)
    pieces = math.ceil(len(positions) / most) * len(layers) + 1
    # The insides of sublayers are built for one position at a time, states for all of a piece.
    flows = blocks if _builds(spec, OF_ATTENTION | OF_MLP) else pieces
    read = shown - junctions if spec.include_projections else 0
    states = _states(spec, blocks)
    vectors = read + states + 3 * len(positions)
    passes = FORWARD + (BACKWARD if spec.differentiates else 0)
    at_once = min(most, len(positions))
    built_at_once, sent_at_once = (at_once * n // blocks + 1 for n in (built, shown))
    projects = spec.include_projections or spec.include_gradients
    collects = projects and sent_at_once < NODES_TOGETHER
    collected = min(NODES_TOGETHER, max(0, shown - sent_at_once)) if collects else 0
    groups = min(pieces, shown // NODES_TOGETHER + 2) if projects else 0
    held = _held(
        sizes,
        spec,
        tokens,
        len(layers),
        len(positions),
        built_at_once,
        sent_at_once,
        collected,
    )
    return Demand(
        passes=passes,
        flops=passes * pass_flops(sizes, tokens, scored)
        + lens_flops(sizes, vectors)
        + _graph_flops(sizes, spec, built, blocks, tokens)
        + _mixer_flops(sizes, spec, mixers, len(positions)),
        flows=flows,
        nodes=built,
        read=read,
        vectors=vectors,
        readings=groups + 2 + (groups if states else 0),
        ranks=vectors,
        memory=held
        + max(
            _working(
                sizes,
                spec,
                tokens,
                len(positions),
                built_at_once,
                sent_at_once + collected,
                max((mixer.count for mixer in mixers), default=0),
            ),
            _backward(sizes, spec, tokens, layers, scored),
        ),
        stream=_stream(sizes, spec, tokens, shown, len(positions))
        + states * reading_bytes(spec.lens.top_k + spec.lens.bottom_k),
        held=held,
    )


def _nodes(
    sizes: CostSizes,
    spec: TraceSpec,
    layers: Sequence[int],
    positions: Sequence[int],
    coarse: int,
    beside: int,
    mixers: Sequence[MixerHeads],
) -> tuple[int, int, int]:
    """Return how many nodes are built, how many are sent, and how many of those not projected.

    `coarse` is the number of layers without known parts, `beside` that of layers which have known
    parts and MIXER_OUTPUT. `mixers` are the mixers whose heads MIXER_HEAD shows.
    """
    kinds: Counter[NodeKind] = Counter()
    for position in positions:
        kinds.update(block_nodes(sizes.facts, spec.selection, position + 1))
    counts: Counter[NodeKind] = Counter()
    for kind, count in kinds.items():
        counts[kind] += count * (len(layers) - coarse)
    for kind, count in COARSE_NODES.items():
        counts[kind] += count * len(positions) * coarse
    counts[NodeKind.MIXER_OUTPUT] += len(positions) * beside
    for mixer in mixers:
        for kind, count in mixer_nodes(spec.selection, mixer.count).items():
            counts[kind] += count * len(positions)
    counts[NodeKind.FINAL_NORM] = counts[NodeKind.PREDICTION] = len(positions)
    shown = {k: count for k, count in counts.items() if not spec.node_kinds or k in spec.node_kinds}
    built = counts if spec.include_checks else shown
    return sum(built.values()), sum(shown.values()), shown.get(NodeKind.ATTENTION_CONCAT, 0)


def _states(spec: TraceSpec, blocks: int) -> int:
    """Return how many gradients of states are projected."""
    if not spec.include_gradients:
        return 0
    sent = STATES_WITH_GRADIENT & spec.node_kinds if spec.node_kinds else STATES_WITH_GRADIENT
    return blocks * len(sent)


def _backward(
    sizes: CostSizes, spec: TraceSpec, tokens: int, layers: Sequence[int], scored: int
) -> int:
    """Return the bytes of autograd's graph from the lowest layer on, and of both passes."""
    if not spec.differentiates:
        return 0
    kept = (sizes.facts.n_layers - layers[0]) * memory.kept_for_backward(sizes, tokens)
    logits = 6 * memory.FLOAT32 * scored * sizes.facts.vocab_size
    return kept + logits + memory.passing(sizes, tokens, scored)


def _graph_flops(sizes: CostSizes, spec: TraceSpec, nodes: int, blocks: int, tokens: int) -> float:
    """Return the operations of building the graphs: heads, rows of both sums, and nodes.

    Attention or MLP are not built if no kind of their nodes is requested.
    """
    facts = sizes.facts
    heads, neurons = facts.n_heads * facts.d_head, facts.d_mlp * max(1, facts.n_experts)
    each = 0.0
    if _builds(spec, OF_ATTENTION):
        each += 16.0 * facts.d_model * heads + 4.0 * heads * tokens
    if _builds(spec, OF_MLP):
        each += 4.0 * facts.d_model * neurons
    return blocks * each + 2.0 * nodes * facts.d_model * facts.d_head


def _mixer_flops(
    sizes: CostSizes, spec: TraceSpec, mixers: Sequence[MixerHeads], positions: int
) -> float:
    """Return the operations of the output maps of all heads."""
    if not _builds(spec, OF_ATTENTION):
        return 0.0
    return 2.0 * positions * sizes.facts.d_model * sum(mixer.output.d_in for mixer in mixers)


def _builds(spec: TraceSpec, kinds: frozenset[NodeKind]) -> bool:
    return spec.include_checks or _shows(spec, kinds)


def _shows(spec: TraceSpec, kinds: frozenset[NodeKind]) -> bool:
    return not spec.node_kinds or not kinds.isdisjoint(spec.node_kinds)


def _working(
    sizes: CostSizes,
    spec: TraceSpec,
    tokens: int,
    positions: int,
    built: int,
    shown: int,
    mixer_heads: int,
) -> int:
    """Return the bytes of the pass or of one piece of the graph, without those of `_held`.

    `mixer_heads` is the largest number of heads of a mixer.
    """
    facts, listed = sizes.facts, spec.lens.top_k + spec.lens.bottom_k
    scored = positions if spec.include_checks else 1
    heads = facts.n_heads * facts.d_head
    graph = memory.FLOAT32 * 4 * _formed(spec, built, positions) * facts.d_model
    if _builds(spec, OF_ATTENTION):  # the heads of one position, with their sources
        graph += memory.FLOAT32 * (6 * facts.d_model + 8 * tokens) * heads
        graph += memory.FLOAT32 * 4 * facts.d_model * mixer_heads
    # The targets and the final norm are projected for all positions at once.
    vectors = max(shown if spec.include_projections else 0, 2 * positions)
    after = graph + memory.read(sizes, vectors, listed) + memory.float_copies(sizes)
    return max(memory.passing(sizes, tokens, scored), after)


def _held(
    sizes: CostSizes,
    spec: TraceSpec,
    tokens: int,
    layers: int,
    positions: int,
    built: int,
    shown: int,
    collected: int,
) -> int:
    """Return the bytes of captured activations, logits and the last piece of the graph.

    `collected` is the number of nodes of earlier pieces that are projected together with it.
    """
    facts, listed = sizes.facts, spec.lens.top_k + spec.lens.bottom_k
    scored = positions if spec.include_checks else 1
    passed = layers * memory.captured(sizes, tokens, positions)
    passed += sizes.item * (scored * facts.vocab_size + tokens * facts.stream_width)
    if spec.differentiates:
        gradients = len(STATES_WITH_GRADIENT) * positions * facts.stream_width
        passed += memory.FLOAT32 * layers * gradients
    sent = shown + collected
    vectors = _formed(spec, built, positions) + (sent if spec.include_vectors else 0)
    if spec.include_projections:
        vectors += collected
        passed += memory.reported(sent, max(listed, spec.overlap_k))
    if spec.include_gradients:
        passed += memory.FLOAT32 * sent * facts.stream_width
    return passed + 2 * memory.FLOAT32 * vectors * facts.stream_width + NUMBERS * sent


def _formed(spec: TraceSpec, built: int, positions: int) -> int:
    """Return how many of the nodes built at once have their vectors in memory."""
    if spec.include_projections or spec.include_vectors or spec.include_checks:
        return built
    return min(built, STATES * min(positions, POSITIONS_AT_ONCE))


def _stream(sizes: CostSizes, spec: TraceSpec, tokens: int, nodes: int, positions: int) -> int:
    listed = spec.lens.top_k + spec.lens.bottom_k
    vector = memory.FLOAT32 * sizes.facts.stream_width + 16 if spec.include_vectors else 0
    reading = reading_bytes(listed) if spec.include_projections else 0
    edges = EDGES_PER_NODE if _shows(spec, OF_EDGES) else 1
    each = NODE_BYTES + reading + vector + edges * EDGE_BYTES
    head = tokens * TOKEN_BYTES + positions * 3 * TOKEN_BYTES
    return head + nodes * each + texts_bytes(sizes, nodes * listed)

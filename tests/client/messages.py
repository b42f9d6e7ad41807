"""Small streams written by hand, whose numbers a test can verify by mental arithmetic.

The trace has one block at position 1 of the prompt "a b", with target " c". Attention writes (3, 0)
and the MLP (0, 4) onto an input of (1, 0), so the block's output is (4, 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from januslens.v1 import common_pb2, gradient_lens_pb2, lens_pb2, trace_pb2

TEXTS = {0: "a", 1: " b", 2: " c", 3: " d", 4: "\n"}


def tokens(*ids: int) -> list[common_pb2.Token]:
    return [common_pb2.Token(id=i, text=TEXTS[i], raw=TEXTS[i].encode()) for i in ids]


def prompt_tokens() -> list[common_pb2.Token]:
    return [
        common_pb2.Token(id=0, text="a", raw=b"a", start=0, end=1),
        common_pb2.Token(id=1, text=" b", raw=b" b", start=1, end=3),
    ]


def projection(
    *top: int, bottom: Sequence[int] = (), rank: int | None = None
) -> lens_pb2.Projection:
    return lens_pb2.Projection(
        top_token_ids=top,
        top_probabilities=[0.5 / 2**i for i in range(len(top))],
        top_logits=[4.0 - i for i in range(len(top))],
        bottom_token_ids=bottom,
        bottom_probabilities=[0.01 for _ in bottom],
        bottom_logits=[-2.0 for _ in bottom],
        entropy_bits=1.5,
        log_normalizer=5.0,
        target_rank=rank,
        target_probability=None if rank is None else 0.25,
        target_logit=None if rank is None else 3.0,
    )


def float_tensor(values: Sequence[float]) -> common_pb2.Tensor:
    array = np.array(values, "<f4")
    return common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=array.tobytes()
    )


def node(
    node_id: str, kind: str, top: Sequence[int] = (), rank: int | None = None, **fields: object
) -> trace_pb2.Node:
    """Return a node at position 1; `kind` has no prefix, and coordinates are in the id's layer."""
    message = trace_pb2.Node(
        id=node_id,
        kind=trace_pb2.NodeKind.Value(f"NODE_KIND_{kind}"),
        position=1,
        projection=projection(*top, rank=rank) if top else None,
    )
    if node_id.startswith("L"):
        message.layer = int(node_id[1 : node_id.index("/")])
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def edge(source: str, target: str, kind: str, weight: float, **values: float) -> trace_pb2.Edge:
    return trace_pb2.Edge(
        source=source,
        target=target,
        kind=trace_pb2.EdgeKind.Value(f"EDGE_KIND_{kind}"),
        weight=weight,
        **values,
    )


NODES = [
    node("p1/BLOCK_INPUT", "BLOCK_INPUT", (1, 0), 3, norm=1.0),
    node("L0/p1/ATTENTION_INPUT", "ATTENTION_INPUT", (1, 3), 2, norm=1.0),
    node("L0/p1/MEMORY_VALUE/h0/s0", "MEMORY_VALUE", (2,), 0, head=0, source_position=0),
    node("L0/p1/HEAD_OUTPUT/h0", "HEAD_OUTPUT", (2, 3), 0, head=0, norm=2.0),
    node("L0/p1/HEAD_OUTPUT/h1", "HEAD_OUTPUT", (3, 2), 1, head=1, norm=1.0),
    node("L0/p1/ATTENTION_CONCAT", "ATTENTION_CONCAT", norm=3.0),
    node("L0/p1/ATTENTION_NEURON/n5", "ATTENTION_NEURON", (0,), 2, neuron=5, activation=9.0),
    node("L0/p1/ATTENTION_OUTPUT", "ATTENTION_OUTPUT", (2, 3), 0, norm=3.0),
    node("L0/p1/RESIDUAL_MID", "RESIDUAL_MID", (3, 2), 1, norm=4.0),
    node("L0/p1/MLP_INPUT", "MLP_INPUT", (3, 4), 2, norm=4.0),
    node("L0/p1/MLP_KEY/n7", "MLP_KEY", (3,), 2, neuron=7, activation=2.0),
    node("L0/p1/MLP_VALUE/n7", "MLP_VALUE", (2,), 0, neuron=7, activation=2.0),
    node("L0/p1/MLP_VALUE/n8", "MLP_VALUE", (3,), 2, neuron=8, activation=-1.0),
    node("L0/p1/OTHER/MLP_OUTPUT", "OTHER", (4,), 3),
    node("L0/p1/MLP_OUTPUT", "MLP_OUTPUT", (2,), 0, norm=4.0),
    node("L0/p1/BLOCK_OUTPUT", "BLOCK_OUTPUT", (2, 3), 0, norm=5.657),
    node("p1/FINAL_NORM", "FINAL_NORM", (2, 3), 0),
    node("p1/PREDICTION", "PREDICTION", (2, 3), 0),
]

# Logit contributions: the embedding 0.5, head 0 1.5, head 1 -0.25, neuron 7 2, neuron 8 0.25,
# the rest of the MLP -0.5; with the constant of 0.5 the target's logit is 4.
EDGES = [
    edge("p1/BLOCK_INPUT", "L0/p1/ATTENTION_INPUT", "NORM", 1.0),
    edge(
        "L0/p1/MEMORY_VALUE/h0/s0",
        "L0/p1/HEAD_OUTPUT/h0",
        "PART",
        2.0,
        share=1.0,
        attention=0.75,
        logit_contribution=1.5,
    ),
    edge(
        "L0/p1/HEAD_OUTPUT/h1",
        "L0/p1/ATTENTION_CONCAT",
        "PART",
        1.0,
        share=0.25,
        logit_contribution=-0.25,
    ),
    edge(
        "L0/p1/HEAD_OUTPUT/h0",
        "L0/p1/ATTENTION_CONCAT",
        "PART",
        2.0,
        share=0.75,
        logit_contribution=1.5,
    ),
    edge("L0/p1/ATTENTION_CONCAT", "L0/p1/ATTENTION_NEURON/n5", "ACTIVATE", 9.0),
    edge(
        "L0/p1/ATTENTION_NEURON/n5",
        "L0/p1/ATTENTION_OUTPUT",
        "PART",
        9.0,
        share=1.0,
        logit_contribution=1.25,
    ),
    edge("p1/BLOCK_INPUT", "L0/p1/RESIDUAL_MID", "PART", 1.0, share=0.25, logit_contribution=0.5),
    edge(
        "L0/p1/ATTENTION_OUTPUT",
        "L0/p1/RESIDUAL_MID",
        "PART",
        3.0,
        share=0.75,
        logit_contribution=1.25,
    ),
    edge("L0/p1/RESIDUAL_MID", "L0/p1/MLP_INPUT", "NORM", 4.0, overlap=0.5),
    edge("L0/p1/MLP_INPUT", "L0/p1/MLP_KEY/n7", "ACTIVATE", 2.0),
    edge("L0/p1/MLP_KEY/n7", "L0/p1/MLP_VALUE/n7", "ACTIVATE", 2.0),
    edge(
        "L0/p1/MLP_VALUE/n8", "L0/p1/MLP_OUTPUT", "PART", 1.0, share=0.125, logit_contribution=0.25
    ),
    edge(
        "L0/p1/MLP_VALUE/n7", "L0/p1/MLP_OUTPUT", "PART", 3.0, share=1.125, logit_contribution=2.0
    ),
    edge(
        "L0/p1/OTHER/MLP_OUTPUT",
        "L0/p1/MLP_OUTPUT",
        "PART",
        1.0,
        share=-0.25,
        logit_contribution=-0.5,
    ),
    edge(
        "L0/p1/RESIDUAL_MID", "L0/p1/BLOCK_OUTPUT", "PART", 4.0, share=0.5, logit_contribution=1.75
    ),
    edge("L0/p1/MLP_OUTPUT", "L0/p1/BLOCK_OUTPUT", "PART", 4.0, share=0.5, logit_contribution=1.75),
    edge("L0/p1/BLOCK_OUTPUT", "p1/FINAL_NORM", "NORM", 5.657),
    edge("p1/FINAL_NORM", "p1/PREDICTION", "PROJECT", 5.0),
]


def trace_header() -> trace_pb2.TraceHeader:
    return trace_pb2.TraceHeader(
        request_id="r1",
        provenance=common_pb2.Provenance(model="tiny", revision="0123", versions={"torch": "2"}),
        sizes=common_pb2.ModelSizes(n_layers=1),
        prompt_tokens=prompt_tokens(),
        layers=[0],
        targets=[
            trace_pb2.PositionTarget(
                position=1,
                target_token_id=2,
                predicted_token_id=2,
                target_probability=0.5,
                target_rank=0,
                target_logit=4.0,
                constant_logit_contribution=0.5,
            )
        ],
    )


def layer(last: bool = True) -> trace_pb2.LayerGraph:
    return trace_pb2.LayerGraph(
        layer=0, nodes=NODES, edges=EDGES, tokens=tokens(2, 3, 4), last=last
    )


def trace_summary() -> trace_pb2.TraceSummary:
    return trace_pb2.TraceSummary(
        nodes=len(NODES),
        edges=len(EDGES),
        times=[common_pb2.StageTime(stage="forward", seconds=0.5)],
        checks=[common_pb2.Guarantee(name="sums", measured_error=0, tolerance=1e-4, held=True)],
        constant_logit_contribution=0.5,
    )


TraceEvents = trace_pb2.TraceHeader | trace_pb2.LayerGraph | trace_pb2.TraceSummary


def trace_stream(*events: TraceEvents) -> list[trace_pb2.TraceResponse]:
    """Return these events, or a whole trace, as numbered responses."""
    responses = []
    for sequence, event in enumerate(events or (trace_header(), layer(), trace_summary())):
        response = trace_pb2.TraceResponse(sequence=sequence)
        name = {"TraceHeader": "header", "LayerGraph": "layer", "TraceSummary": "summary"}
        getattr(response, name[event.DESCRIPTOR.name]).CopyFrom(event)
        responses.append(response)
    return responses


# The gradient: FF2 of layer 1, [2, 3], of two positions; its components are of size 10 and 2.
INPUTS = np.array([[0, 2], [3, 4]], np.float32)
VJPS = np.array([[1, 0, 0], [0, 2, 0]], np.float32)


def component(position: int, *, factors: bool) -> gradient_lens_pb2.Component:
    x, vjp = INPUTS[position], VJPS[position]
    return gradient_lens_pb2.Component(
        position=position,
        input_norm=float(np.linalg.norm(x)),
        vjp_norm=float(np.linalg.norm(vjp)),
        size=float(np.linalg.norm(x) * np.linalg.norm(vjp)),
        projection=projection(3, 4, bottom=[2, 0], rank=4),
        predicted_rank=1,
        other_side=[gradient_lens_pb2.Coordinate(index=1, value=float(x[1]))],
        input=float_tensor(x.tolist()) if factors else None,
        vjp=float_tensor(vjp.tolist()) if factors else None,
        target_ranks=[4],
    )


def gradient_header() -> gradient_lens_pb2.GradientHeader:
    return gradient_lens_pb2.GradientHeader(
        request_id="r2",
        provenance=common_pb2.Provenance(model="tiny", revision="0123"),
        prompt_tokens=prompt_tokens(),
        loss=1.25,
        target_token_ids=[2],
        predicted_token_id=3,
        skipped=[gradient_lens_pb2.MATRIX_KIND_GATE],
    )


def matrix(
    positions: Sequence[int] = (1, 0), *, last: bool = True, factors: bool = True
) -> gradient_lens_pb2.GradientMatrix:
    return gradient_lens_pb2.GradientMatrix(
        layer=1,
        kind=gradient_lens_pb2.MATRIX_KIND_FF2,
        d_in=2,
        d_out=3,
        projected_side=gradient_lens_pb2.GRADIENT_FACTOR_VJP,
        promoted_end=gradient_lens_pb2.RANKING_END_BOTTOM,
        components=[component(position, factors=factors) for position in positions],
        component_count=2,
        frobenius_norm=float(np.linalg.norm(INPUTS.T @ VJPS)),
        tokens=tokens(2, 3, 4),
        last=last,
    )


def input_matrix() -> gradient_lens_pb2.GradientMatrix:
    """Return FF1 of layer 1 with everything that can be requested besides the components."""
    message = matrix()
    message.kind = gradient_lens_pb2.MATRIX_KIND_FF1
    message.projected_side = gradient_lens_pb2.GRADIENT_FACTOR_INPUT
    message.promoted_end = gradient_lens_pb2.RANKING_END_UNSPECIFIED
    message.spectrum.add(value=10.0, explained=0.96, projection=projection(3, bottom=[2]))
    message.neurons.add(
        neuron=9, change_norm=0.5, before=projection(0), change=projection(2), after=projection(3)
    )
    message.verification.relative_error = 2e-7
    message.verification.tolerance = 1e-5
    return message


def gradient_summary() -> gradient_lens_pb2.GradientSummary:
    return gradient_lens_pb2.GradientSummary(
        matrices=1,
        times=[common_pb2.StageTime(stage="backward", seconds=0.5)],
        segments=[
            gradient_lens_pb2.SegmentRow(
                segment=gradient_lens_pb2.PROMPT_SEGMENT_LAST_TOKEN,
                layer=1,
                kind=gradient_lens_pb2.MATRIX_KIND_FF2,
                mean_vjp_norm=2.0,
                mean_target_rank=4.0,
                positions=1,
            )
        ],
    )


GradientEvents = (
    gradient_lens_pb2.GradientHeader
    | gradient_lens_pb2.GradientMatrix
    | gradient_lens_pb2.GradientSummary
)


def gradient_stream(*events: GradientEvents) -> list[gradient_lens_pb2.GradientLensResponse]:
    """Return these events, or a whole gradient of two matrices, as numbered responses."""
    whole = (gradient_header(), matrix(), input_matrix(), gradient_summary())
    responses = []
    for sequence, event in enumerate(events or whole):
        response = gradient_lens_pb2.GradientLensResponse(sequence=sequence)
        name = {
            "GradientHeader": "header",
            "GradientMatrix": "matrix",
            "GradientSummary": "summary",
        }
        getattr(response, name[event.DESCRIPTOR.name]).CopyFrom(event)
        responses.append(response)
    return responses

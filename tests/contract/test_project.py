"""Project gives the same results for a caller's vectors as Trace for its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from januslens.v1 import common_pb2, lens_pb2, models_pb2, service_pb2_grpc, trace_pb2
from tests.support.calls import prompt

Stub = service_pb2_grpc.IntrospectionServiceStub
Vectors = NDArray[np.float32]

PROMPT = "The capital of Japan is the city of"
# Projected by the unembedding only, because they have already passed the final norm.
NORMED = {trace_pb2.NODE_KIND_FINAL_NORM, trace_pb2.NODE_KIND_PREDICTION}


def tensor(values: Vectors) -> common_pb2.Tensor:
    return common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes()
    )


@pytest.mark.parametrize("lens", lens_pb2.Lens.values()[1:], ids=lens_pb2.Lens.keys()[1:])
def test_projection_of_a_node_vector_equals_the_traces(
    stub: Stub, lens: lens_pb2.Lens.ValueType
) -> None:
    request = trace_pb2.TraceRequest(
        input=prompt(PROMPT), include_vectors=True, layers=[1, 3], lens=lens
    )
    header, *pieces, _ = stub.Trace(request)
    nodes = [
        node
        for piece in pieces
        for node in piece.layer.nodes
        if node.HasField("projection") and node.kind not in NORMED
    ]
    assert len(nodes) > 200
    vectors = np.stack([np.frombuffer(node.vector.data, dtype="<f4") for node in nodes])
    target = common_pb2.Target(
        token_ids=common_pb2.TokenIds(ids=[header.header.targets[0].target_token_id])
    )
    answer = stub.Project(
        lens_pb2.ProjectRequest(vectors=tensor(vectors), lens=lens, target=target)
    )
    assert len(answer.projections) == len(nodes)
    for node, projection in zip(nodes, answer.projections, strict=True):
        assert_equal(node.projection, projection)
    named = {i for p in answer.projections for i in (*p.top_token_ids, *p.bottom_token_ids)}
    assert {token.id for token in answer.tokens} == named
    assert answer.provenance == header.header.provenance


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compare up to the last bits, which depend on the other vectors of the matrix product."""
    assert ours.target_rank == theirs.target_rank
    assert list(ours.top_token_ids) == list(theirs.top_token_ids)
    assert list(ours.bottom_token_ids) == list(theirs.bottom_token_ids)
    for field in ("top_logits", "bottom_logits", "top_probabilities", "bottom_probabilities"):
        np.testing.assert_allclose(
            getattr(ours, field), getattr(theirs, field), rtol=1e-4, atol=1e-5
        )
    assert ours.entropy_bits == pytest.approx(theirs.entropy_bits, abs=1e-4)
    assert ours.target_probability == pytest.approx(theirs.target_probability, abs=1e-5)


def test_single_vectors_and_half_types_give_the_same_projections(
    stub: Stub, demo: models_pb2.Model
) -> None:
    values = (np.arange(demo.d_model) % 7 - 3).astype("<f4")  # exact in every floating type
    float16 = common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT16,
        shape=[1, demo.d_model],
        data=values.astype("<f2").tobytes(),
    )
    bfloat16 = common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_BFLOAT16,
        shape=[demo.d_model],
        data=(values.view("<u4") >> 16).astype("<u2").tobytes(),
    )
    answers = [
        stub.Project(lens_pb2.ProjectRequest(vectors=vectors))
        for vectors in (tensor(values), float16, bfloat16)
    ]
    assert len(answers[0].projections) == 1
    assert answers[0] == answers[1] == answers[2]


def test_zero_vector_has_an_empty_projection(stub: Stub, demo: models_pb2.Model) -> None:
    values = np.zeros((3, demo.d_model), dtype="<f4")
    values[1] = 1.0
    answer = stub.Project(lens_pb2.ProjectRequest(vectors=tensor(values)))
    empty = lens_pb2.Projection()
    assert [projection == empty for projection in answer.projections] == [True, False, True]


def test_the_largest_answer_fits_into_a_clients_default_limit(
    stub: Stub, demo: models_pb2.Model
) -> None:
    values = np.random.default_rng(0).normal(size=(4096, demo.d_model)).astype("<f4")
    request = lens_pb2.ProjectRequest(vectors=tensor(values), top_k=8, bottom_k=8)
    assert stub.Project(request).ByteSize() < 4 * 2**20

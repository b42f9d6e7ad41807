"""Convert requests to specs: the contract's defaults, and every field in its place.

Refused fields are tested over the wire in tests/contract.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from januslens.v1 import (
    common_pb2,
    edits_pb2,
    gradient_lens_pb2,
    interventions_pb2,
    lens_pb2,
    trace_pb2,
)
from januslens.v1.common_pb2 import Input, Target, TokenIds
from januslens_server import specs
from januslens_server.errors import InvalidRequest
from januslens_server.results import MatrixKind, NodeKind
from januslens_server.rpc.decode import (
    gradient_lens_spec,
    preview_edit_spec,
    project_spec,
    trace_spec,
)

PROMPT = Input(prompt="Japan")
PARIS = Target(text=" Paris")
IDS = Target(token_ids=TokenIds(ids=[5]))
NLL = gradient_lens_pb2.NegativeLogLikelihood(target=PARIS)
ONES = np.ones(4, "<f4")


def gradient(**fields: Any) -> specs.GradientLensSpec:
    return gradient_lens_spec(
        gradient_lens_pb2.GradientLensRequest(**{"input": PROMPT, "nll": NLL, **fields})
    )


@pytest.mark.parametrize(
    ("fields", "projects"),
    [
        ({}, True),
        ({"top_k": 0}, True),
        ({"top_k": 0, "bottom_k": 0}, False),
        ({"top_k": 0, "bottom_k": 0, "overlap_k": 3}, True),
        ({"top_k": 0, "bottom_k": 0, "include_projections": True}, True),
        ({"include_projections": False}, False),
    ],
)
def test_trace_projects_nodes_only_if_something_of_a_projection_is_requested(
    fields: dict[str, Any], projects: bool
) -> None:
    request = trace_pb2.TraceRequest(input=PROMPT, **fields)
    assert trace_spec(request).include_projections is projects


def test_overlap_without_projections_is_refused() -> None:
    request = trace_pb2.TraceRequest(input=PROMPT, include_projections=False, overlap_k=3)
    with pytest.raises(InvalidRequest, match="overlap_k compares projections"):
        trace_spec(request)


def test_an_unset_trace_has_the_contracts_defaults() -> None:
    spec = trace_spec(trace_pb2.TraceRequest(input=PROMPT))
    assert spec == specs.TraceSpec("Japan")
    assert spec.selection == specs.Selection(
        heads=10, memory_values_per_head=2, top_neurons=18, bottom_neurons=7
    )
    assert spec.lens == specs.LensSpec(top_k=5, bottom_k=5, kind=specs.LensKind.FINAL_NORM)
    assert (spec.target, spec.layers, spec.positions) == (None, (), ())
    assert spec.node_kinds == frozenset()


def test_an_unset_gradient_has_the_contracts_defaults() -> None:
    spec = gradient()
    assert spec == specs.GradientLensSpec("Japan", specs.NegativeLogLikelihood(" Paris"))
    assert (spec.components, spec.spectrum_rank, spec.neurons) == (16, 0, 0)
    assert (spec.learning_rate, spec.subject, spec.verify) == (None, None, False)


def test_zero_is_distinguished_from_unset() -> None:
    """0 means no tokens, all parts and all components."""
    selection = trace_pb2.Selection(heads=0, bottom_neurons=0)
    spec = trace_spec(
        trace_pb2.TraceRequest(input=PROMPT, top_k=0, bottom_k=0, selection=selection)
    )
    assert (spec.lens.top_k, spec.lens.bottom_k) == (0, 0)
    assert spec.selection == specs.Selection(heads=0, bottom_neurons=0)
    assert gradient(components=0).components == 0
    assert gradient(learning_rate=0.0).learning_rate == 0.0


def test_every_field_of_a_trace_arrives() -> None:
    spec = trace_spec(
        trace_pb2.TraceRequest(
            input=Input(token_ids=TokenIds(ids=[7, 8])),
            target=IDS,
            layers=[3, 1],
            positions=[-1, 0],
            all_positions=True,
            selection=trace_pb2.Selection(
                heads=1, memory_values_per_head=2, top_neurons=3, bottom_neurons=4
            ),
            top_k=6,
            bottom_k=7,
            lens=lens_pb2.LENS_RAW,
            node_kinds=[trace_pb2.NODE_KIND_OTHER],
            include_vectors=True,
            include_logit_contribution=True,
            overlap_k=8,
            other=common_pb2.Target(token_ids=TokenIds(ids=[6])),
            include_attribution=True,
            include_gradients=True,
        )
    )
    assert spec == specs.TraceSpec(
        prompt=(7, 8),
        target=(5,),
        layers=(3, 1),
        positions=(-1, 0),
        all_positions=True,
        selection=specs.Selection(1, 2, 3, 4),
        lens=specs.LensSpec(6, 7, specs.LensKind.RAW),
        node_kinds=frozenset({NodeKind.OTHER}),
        include_vectors=True,
        include_logit_contribution=True,
        overlap_k=8,
        other=(6,),
        include_attribution=True,
        include_gradients=True,
    )


def test_gradients_of_states_need_projections() -> None:
    request = trace_pb2.TraceRequest(input=PROMPT, include_gradients=True, top_k=0, bottom_k=0)
    assert trace_spec(request).include_projections
    request.include_projections = False
    with pytest.raises(InvalidRequest, match="include_gradients projects gradients"):
        trace_spec(request)


def test_every_field_of_a_gradient_arrives() -> None:
    spec = gradient(
        matrices=[gradient_lens_pb2.MATRIX_KIND_O],
        layers=[2],
        top_k=1,
        bottom_k=2,
        lens=lens_pb2.LENS_NORMALIZED,
        components=3,
        spectrum_rank=4,
        neurons=5,
        learning_rate=0.5,
        subject=gradient_lens_pb2.Subject(span=gradient_lens_pb2.Span(start=1, end=2)),
        include_factors=True,
        verify=True,
    )
    assert spec == specs.GradientLensSpec(
        prompt="Japan",
        loss=specs.NegativeLogLikelihood(" Paris"),
        matrices=(MatrixKind.O,),
        layers=(2,),
        lens=specs.LensSpec(1, 2, specs.LensKind.NORMALIZED),
        components=3,
        spectrum_rank=4,
        neurons=5,
        learning_rate=0.5,
        subject=specs.Span(1, 2),
        include_factors=True,
        verify=True,
    )


def test_losses_and_subjects_by_their_kind() -> None:
    difference = gradient_lens_pb2.LogitDifference(preferred=PARIS, other=IDS)
    assert gradient(logit_difference=difference).loss == specs.LogitDifference(" Paris", (5,))
    divergence = gradient_lens_pb2.KlDivergence(suppressed=TokenIds(ids=[1, 2]))
    assert gradient(kl=divergence).loss == specs.KlDivergence((1, 2))
    assert gradient(subject=gradient_lens_pb2.Subject(text="Japan")).subject == "Japan"


def test_edits_by_their_kind() -> None:
    descent = edits_pb2.DescentStep(
        matrices=[gradient_lens_pb2.MATRIX_KIND_FF2], layers=[1], learning_rate=0.5
    )
    request = edits_pb2.PreviewEditRequest(input=PROMPT, target=PARIS, descent=descent)
    request.probes.add(label="near", input=Input(prompt="Peru"), target=IDS)
    request.probes.add(input=Input(prompt="Chile"))
    spec = preview_edit_spec(request)
    assert spec.edit == specs.DescentStep((MatrixKind.FF2,), (1,), 0.5)
    assert spec.probes == (specs.Probe("near", "Peru", (5,)), specs.Probe("", "Chile", None))
    shift = edits_pb2.ForwardShift(layer=3, eta=-0.25)
    spec = preview_edit_spec(edits_pb2.PreviewEditRequest(input=PROMPT, target=PARIS, shift=shift))
    assert spec.edit == specs.ForwardShift(3, -0.25)
    shift.include_gradient_cosine = True
    spec = preview_edit_spec(edits_pb2.PreviewEditRequest(input=PROMPT, target=PARIS, shift=shift))
    assert spec.edit == specs.ForwardShift(3, -0.25, gradient_cosine=True)


@pytest.mark.parametrize(
    ("data_type", "data"),
    [
        (common_pb2.DATA_TYPE_FLOAT32, ONES.tobytes()),
        (common_pb2.DATA_TYPE_FLOAT16, ONES.astype("<f2").tobytes()),
        (common_pb2.DATA_TYPE_BFLOAT16, (ONES.view("<u4") >> 16).astype("<u2").tobytes()),
    ],
    ids=["float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("shape", [[4], [1, 4], [2, 2]])
def test_a_tensor_becomes_float32_rows(
    data_type: common_pb2.DataType.ValueType, data: bytes, shape: list[int]
) -> None:
    tensor = common_pb2.Tensor(data_type=data_type, shape=shape, data=data)
    vectors = project_spec(lens_pb2.ProjectRequest(vectors=tensor)).vectors
    assert vectors.dtype == np.float32
    assert vectors.shape == (4 // shape[-1], shape[-1])
    assert (vectors == 1).all()


def test_the_callers_bytes_are_copied() -> None:
    """A request runs later, when its message may have been freed."""
    tensor = common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[4], data=ONES.tobytes()
    )
    vectors = project_spec(lens_pb2.ProjectRequest(vectors=tensor)).vectors
    owner = vectors if vectors.base is None else vectors.base  # a reshaped copy is a view of it
    assert isinstance(owner, np.ndarray)
    assert owner.flags.owndata
    assert vectors.flags.writeable


@pytest.mark.parametrize(
    "field", ["input.token_ids.ids", "interventions[0].patch.input.token_ids.ids", "target"]
)
def test_more_token_ids_than_the_context_are_refused_before_they_are_converted(field: str) -> None:
    """250,000 Python integers take 10 MB, and hold up other requests while they are made."""
    many = Input(token_ids=TokenIds(ids=range(1000, 251_000)))
    request = trace_pb2.TraceRequest(input=PROMPT)
    if field == "target":
        request.target.token_ids.CopyFrom(many.token_ids)
        field = "target.token_ids.ids"
    elif field.startswith("interventions"):
        request.interventions.add(site=1, patch=interventions_pb2.Patch(input=many))
    else:
        request.input.CopyFrom(many)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as refused:
            trace_spec(request, 512)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(refused.value) == (
        f"{field}: too many tokens: expected at most 512, got 250000; send fewer"
    )
    assert peak < 2**20


def test_long_lists_of_token_ids_are_converted_completely() -> None:
    ids = range(10_000)
    request = trace_pb2.TraceRequest(input=Input(token_ids=TokenIds(ids=ids)))
    assert trace_spec(request).prompt == tuple(ids)

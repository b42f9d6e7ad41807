"""The client's enumerations equal those of the contract."""

from __future__ import annotations

import pytest

from januslens import EdgeKind, End, Lens, MatrixKind, NodeKind, Side
from januslens.results.kinds import LENSES, NODE_KINDS, Kind
from januslens.v1 import gradient_lens_pb2, lens_pb2, trace_pb2


@pytest.mark.parametrize(
    ("kind", "names", "prefix"),
    [
        (NodeKind, trace_pb2.NodeKind.keys(), "NODE_KIND_"),
        (EdgeKind, trace_pb2.EdgeKind.keys(), "EDGE_KIND_"),
        (MatrixKind, gradient_lens_pb2.MatrixKind.keys(), "MATRIX_KIND_"),
        (Lens, lens_pb2.Lens.keys(), "LENS_"),
        (Side, gradient_lens_pb2.GradientFactor.keys(), "GRADIENT_FACTOR_"),
        (End, gradient_lens_pb2.RankingEnd.keys(), "RANKING_END_"),
    ],
)
def test_client_enums_have_every_member_of_the_contract(
    kind: type[Kind], names: list[str], prefix: str
) -> None:
    assert [prefix + member.name for member in kind] == names
    assert all(member.value == member.name for member in kind)


def test_enum_numbers_convert_both_ways() -> None:
    assert NODE_KINDS.member(trace_pb2.NODE_KIND_HEAD_OUTPUT) is NodeKind.HEAD_OUTPUT
    assert LENSES.number(Lens.RAW) == lens_pb2.LENS_RAW


def test_a_kind_of_a_newer_server_is_unspecified() -> None:
    assert NODE_KINDS.member(999) is NodeKind.UNSPECIFIED


def test_names_are_accepted_in_any_case_and_others_refused_with_a_list() -> None:
    assert NodeKind.of("head_output") is NodeKind.HEAD_OUTPUT
    with pytest.raises(ValueError, match=r"unknown value 'ff3'; expected one of .*FF1"):
        MatrixKind.of("ff3")

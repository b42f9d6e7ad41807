"""Messages encoded by columns are equal to those that protocol buffers' own library creates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from januslens.v1 import gradient_lens_pb2, lens_pb2, trace_pb2
from januslens_server.rpc.encode.columns import Cells, Columns, Parts, varints

COUNT = 40
RANDOM = np.random.default_rng(0)
PRESENT = RANDOM.random(COUNT) < 0.5
INTEGERS = 2 ** RANDOM.integers(0, 32, COUNT) - RANDOM.integers(0, 2, COUNT)
NUMBERS = RANDOM.normal(size=(COUNT, 3)).astype(np.float32)
# Some lists of ids take more than 127 bytes, so that their length takes two.
IDS = 2 ** RANDOM.integers(0, 32, (COUNT, 50)) - 1
NAMES = ["x" * (i + 1) for i in range(COUNT)]


def projections() -> Columns:
    columns = Columns(lens_pb2.Projection, COUNT)
    columns.unsigned_lists("top_token_ids", IDS)
    columns.float_lists("top_logits", NUMBERS)
    columns.float_lists("bottom_logits", NUMBERS[:, :0])
    columns.floats("entropy_bits", NUMBERS[:, 0])
    return columns


def parts() -> Parts:
    nodes = Columns(trace_pb2.Node, COUNT)
    nodes.texts("id", NAMES)
    nodes.unsigned("neuron", INTEGERS, PRESENT)
    nodes.unsigned("layer", INTEGERS)
    nodes.floats("activation", NUMBERS[:, 0], PRESENT)
    nodes.floats("norm", NUMBERS[:, 1], np.zeros(COUNT, np.bool_))
    nodes.delimited("projection", projections().cells(), ~PRESENT)
    return Parts(trace_pb2.LayerGraph, "nodes", nodes)


def expected(i: int) -> trace_pb2.Node:
    fields: dict[str, Any] = {"id": NAMES[i], "layer": int(INTEGERS[i])}
    if PRESENT[i]:
        fields |= {"neuron": int(INTEGERS[i]), "activation": float(NUMBERS[i, 0])}
    else:
        fields["projection"] = {
            "top_token_ids": IDS[i].tolist(),
            "top_logits": NUMBERS[i].tolist(),
            "entropy_bits": float(NUMBERS[i, 0]),
        }
    return trace_pb2.Node(**fields)


@pytest.mark.parametrize(("start", "stop"), [(0, COUNT), (0, 0), (3, 4), (7, 31)])
def test_columns_are_parsed_as_the_messages_that_they_describe(start: int, stop: int) -> None:
    graph = trace_pb2.LayerGraph.FromString(parts().between(start, stop))
    assert list(graph.nodes) == [expected(i) for i in range(start, stop)]


def test_sizes_are_those_of_the_messages() -> None:
    assert parts().sizes.tolist() == [expected(i).ByteSize() for i in range(COUNT)]


def test_lists_of_messages_are_parsed_as_they_were_given() -> None:
    coordinates = Columns(gradient_lens_pb2.Coordinate, 2 * COUNT)
    coordinates.unsigned("index", np.stack([INTEGERS, INTEGERS[::-1]], 1).ravel())
    coordinates.floats("value", NUMBERS[:, :2].ravel())
    values = Columns(gradient_lens_pb2.Singular, COUNT)
    values.message_lists("other_side", coordinates)
    parts = Parts(gradient_lens_pb2.GradientMatrix, "spectrum", values)
    matrix = gradient_lens_pb2.GradientMatrix.FromString(parts.between(0, COUNT))
    assert [[(c.index, c.value) for c in row.other_side] for row in matrix.spectrum] == [
        [(INTEGERS[i], NUMBERS[i, 0]), (INTEGERS[-1 - i], NUMBERS[i, 1])] for i in range(COUNT)
    ]


def test_no_messages_take_no_bytes() -> None:
    nodes = Columns(trace_pb2.Node, 0)
    nodes.texts("id", [])
    nodes.unsigned("layer", np.empty(0, np.int64))
    assert Parts(trace_pb2.LayerGraph, "nodes", nodes).between(0, 0) == b""


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**14 - 1, 2**14, 2**32 - 1, 2**62])
def test_integers_are_encoded_in_groups_of_seven_bits(value: int) -> None:
    cells: Cells = varints(np.array([value, 0]))
    data, used = cells.joined(2)
    groups, rest = [value & 0x7F], value >> 7
    while rest:
        groups[-1] |= 0x80
        groups.append(rest & 0x7F)
        rest >>= 7
    assert data[0][used[0]].tolist() == groups
    assert data[1][used[1]].tolist() == [0]
    assert (np.zeros(2) + cells.lengths).tolist() == [len(groups), 1]

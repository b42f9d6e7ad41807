"""Test the conversion of numbers to bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from januslens import Tensor
from januslens.results.vectors import tensor_message
from januslens.v1 import common_pb2


@given(st_numpy.arrays(np.float32, st_numpy.array_shapes(max_dims=3, max_side=4)))
def test_float32_comes_back_bit_by_bit(array: np.ndarray) -> None:
    back = Tensor.from_message(tensor_message(array)).numpy()
    assert back.dtype == np.float32
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(st.lists(st.floats(width=16), min_size=1))
def test_float16_stays_float16(values: list[float]) -> None:
    array = np.array(values, np.float16)
    back = Tensor.from_message(tensor_message(array)).numpy()
    assert back.dtype == np.float16
    np.testing.assert_array_equal(back, array)


def test_bfloat16_is_the_upper_half_of_a_float32() -> None:
    # 1 = 0x3F80, -2 = 0xC000, 3.140625 = 0x4049 (the nearest to pi), infinity = 0x7F80.
    data = np.array([0x3F80, 0xC000, 0x4049, 0x7F80], "<u2").tobytes()
    tensor = Tensor("bfloat16", (2, 2), data)
    np.testing.assert_array_equal(tensor.numpy(), [[1.0, -2.0], [3.140625, np.inf]])
    assert tensor.numpy().dtype == np.float32


def test_integers_keep_their_value() -> None:
    message = common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_INT64,
        shape=[2],
        data=np.array([2**40, -1], "<i8").tobytes(),
    )
    assert Tensor.from_message(message).numpy().tolist() == [2**40, -1]


def test_arrays_can_be_written_to() -> None:
    array = Tensor("float32", (1,), np.zeros(1, "<f4").tobytes()).numpy()
    array[0] = 1.0
    assert array[0] == 1.0


def test_bytes_that_do_not_fill_the_shape_are_an_error() -> None:
    with pytest.raises(ValueError, match="reshape"):
        Tensor("float32", (3,), b"\0" * 8).numpy()


def test_an_unknown_data_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="known data type"):
        Tensor("unspecified", (1,), b"\0" * 4).numpy()


@pytest.mark.parametrize("vectors", [["a"], np.array([1j]), np.array([True])])
def test_only_real_numbers_are_sent(vectors: object) -> None:
    with pytest.raises(TypeError, match="real numbers"):
        tensor_message(vectors)  # type: ignore[arg-type]  # that is the point

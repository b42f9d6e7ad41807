"""Vectors and matrices as they travel, and as numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from januslens.v1 import common_pb2

Floats = NDArray[np.float32]

_LITTLE_ENDIAN: dict[int, str] = {
    common_pb2.DATA_TYPE_FLOAT32: "<f4",
    common_pb2.DATA_TYPE_FLOAT16: "<f2",
    common_pb2.DATA_TYPE_BFLOAT16: "<u2",
    common_pb2.DATA_TYPE_INT64: "<i8",
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Numbers as the server sent them: little-endian, row-major.

    Attributes:
        data_type: `float32`, `float16`, `bfloat16` or `int64`.
        shape: Sizes of the axes.
        data: The bytes.
    """

    data_type: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def from_message(cls, message: common_pb2.Tensor) -> Tensor:
        """Read one tensor."""
        name = common_pb2.DataType.Name(message.data_type)
        return cls(name.removeprefix("DATA_TYPE_").lower(), tuple(message.shape), message.data)

    def numpy(self) -> NDArray[np.generic]:
        """A copy as an array; bfloat16, which numpy does not know, becomes float32.

        Raises:
            ValueError: The data type is unknown, or the bytes don't fill the shape.
        """
        code = common_pb2.DataType.Value(f"DATA_TYPE_{self.data_type.upper()}")
        if code not in _LITTLE_ENDIAN:
            raise ValueError(f"expected a tensor of a known data type, got {self.data_type!r}")
        array = np.frombuffer(self.data, dtype=_LITTLE_ENDIAN[code]).reshape(self.shape)
        if code == common_pb2.DATA_TYPE_BFLOAT16:
            # bfloat16 is the upper half of a float32.
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(array.dtype.newbyteorder("="))

    def float32(self) -> Floats:
        """The same numbers in float32."""
        return self.numpy().astype(np.float32)


def tensor_message(vectors: ArrayLike) -> common_pb2.Tensor:
    """`vectors` as a message: float16 stays, every other real type becomes float32.

    Raises:
        TypeError: They are not real numbers.
        ValueError: One is infinite or NaN, in float32.
    """
    array = np.asarray(vectors)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"expected real numbers, got an array of {array.dtype}")
    if array.dtype == np.float16:
        code, kept = common_pb2.DATA_TYPE_FLOAT16, array.astype("<f2")
    else:
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
            code, kept = common_pb2.DATA_TYPE_FLOAT32, array.astype("<f4")
    if not np.isfinite(kept).all():
        raise ValueError("vectors must be finite in float32; they hold infinity or NaN")
    return common_pb2.Tensor(data_type=code, shape=kept.shape, data=kept.tobytes())

"""A GradientLens that goes on at another replica."""

from __future__ import annotations

from typing import Any

from januslens._stream.splice import Splice, replace_all
from januslens.v1 import gradient_lens_pb2

_Key = tuple[int, int, int | None]


class GradientSplice(
    Splice[gradient_lens_pb2.GradientLensRequest, gradient_lens_pb2.GradientLensResponse]
):
    """Asks for the layers that are missing, the one that was cut included.

    Which matrices a layer has is the server's to know: those of the cut layer that had come are
    dropped. A table of segments is made over all matrices, so with a subject all are asked for.
    """

    def __init__(self, request: gradient_lens_pb2.GradientLensRequest) -> None:
        super().__init__(request)
        self._matrices: list[_Key] = []

    def rest(self) -> gradient_lens_pb2.GradientLensRequest:
        """The layers from the one that was cut down, on the same weights."""
        request = self._again()
        if self._matrices and not request.HasField("subject"):
            cut = self._matrices[-1][0]
            asked = request.layers or range(cut + 1)
            replace_all(request.layers, sorted(layer for layer in set(asked) if layer <= cut))
        return request

    def _take_part(
        self, response: gradient_lens_pb2.GradientLensResponse
    ) -> list[gradient_lens_pb2.GradientLensResponse]:
        matrix = response.matrix
        key = (matrix.layer, matrix.kind, matrix.expert if matrix.HasField("expert") else None)
        if key in self._matrices:
            return []
        self._held.append(response)
        if not matrix.last:
            return []
        whole, self._held = self._held, []
        self._matrices.append(key)
        for piece in whole:
            replace_all(piece.matrix.tokens, self._unnamed(piece.matrix.tokens))
        return whole

    def _sum_up(
        self, response: gradient_lens_pb2.GradientLensResponse
    ) -> gradient_lens_pb2.GradientLensResponse:
        response.summary.matrices = len(self._matrices)
        return response

    def _targets(self, header: Any) -> list[int]:
        return list(header.target_token_ids)

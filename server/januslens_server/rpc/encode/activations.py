"""Encode the events of an Activations stream as messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from januslens.v1 import activations_pb2, common_pb2, sites_pb2, streams_pb2
from januslens_server.results import (
    ActivationsEvent,
    ActivationsHeader,
    ActivationsSummary,
    SiteValues,
)
from januslens_server.rpc.encode.messages import (
    level_messages,
    provenance_message,
    time_messages,
    token_message,
)

# Bytes of values in a message; with the rest of the message they stay within 1 MiB.
PIECE_BYTES = 2**20 - 4096

_DATA_TYPES = {
    "float32": (common_pb2.DATA_TYPE_FLOAT32, 4),
    "float16": (common_pb2.DATA_TYPE_FLOAT16, 2),
    "bfloat16": (common_pb2.DATA_TYPE_BFLOAT16, 2),
}


class ActivationsEncoder:
    """Encodes one stream and numbers its messages."""

    def __init__(self, request_id: str) -> None:
        """`request_id` is sent in the header."""
        self._request_id = request_id
        self._sequence = itertools.count()
        self._tensors = 0

    def encode(self, event: ActivationsEvent) -> Iterator[activations_pb2.ActivationsResponse]:
        """Yield the messages of one event, in the order in which they must be sent."""
        if isinstance(event, ActivationsHeader):
            yield self._response(header=self._header(event))
        elif isinstance(event, ActivationsSummary):
            times = time_messages(event.times)
            summary = streams_pb2.StreamSummary(messages=self._tensors, times=times)
            yield self._response(summary=summary)
        else:
            for tensor in _pieces(event):
                self._tensors += 1
                yield self._response(tensor=tensor)

    def _response(
        self,
        header: streams_pb2.StreamHeader | None = None,
        tensor: activations_pb2.SiteTensor | None = None,
        summary: streams_pb2.StreamSummary | None = None,
    ) -> activations_pb2.ActivationsResponse:
        return activations_pb2.ActivationsResponse(
            sequence=next(self._sequence), header=header, tensor=tensor, summary=summary
        )

    def _header(self, header: ActivationsHeader) -> streams_pb2.StreamHeader:
        return streams_pb2.StreamHeader(
            request_id=self._request_id,
            provenance=provenance_message(header.provenance),
            prompt_tokens=[token_message(token) for token in header.prompt_tokens],
            positions=header.positions,
            limited_layers=level_messages(header.limited_layers),
        )


def _pieces(values: SiteValues) -> Iterator[activations_pb2.SiteTensor]:
    data_type, item = _DATA_TYPES[values.data_type]
    for start in range(0, len(values.data), PIECE_BYTES):
        data = values.data[start : start + PIECE_BYTES]
        yield activations_pb2.SiteTensor(
            site=sites_pb2.Site.ValueType(values.site),
            layer=values.layer,
            offset=values.offset + start // item,
            shape=values.shape,
            piece=common_pb2.Tensor(
                data_type=data_type, shape=[len(data) // item], data=data.tobytes()
            ),
        )

"""Encode the events of a Generate as messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from januslens.v1 import generation_pb2, streams_pb2
from januslens_server.results import GeneratedToken, GenerationEvent, GenerationHeader
from januslens_server.rpc.encode.messages import (
    ReadToken,
    TokenTexts,
    provenance_message,
    time_messages,
    token_message,
)


class GenerateEncoder:
    """Encodes one stream: numbers its messages and sends the text of each token once."""

    def __init__(self, request_id: str, read_token: ReadToken) -> None:
        """`read_token` returns the token with a vocabulary id."""
        self._request_id = request_id
        self._texts = TokenTexts(read_token)
        self._sequence = itertools.count()

    def encode(self, event: GenerationEvent) -> Iterator[generation_pb2.GenerateResponse]:
        """Yield the message of one event."""
        response = generation_pb2.GenerateResponse(sequence=next(self._sequence))
        if isinstance(event, GenerationHeader):
            header = streams_pb2.StreamHeader(
                request_id=self._request_id,
                provenance=provenance_message(event.provenance),
                prompt_tokens=self._texts.of_prompt(event.prompt_tokens),
            )
            response.header.CopyFrom(header)
        elif isinstance(event, GeneratedToken):
            response.generated.CopyFrom(_generated(event))
            named = itertools.chain(event.top_ids, *(read.top_ids for read in event.layers))
            response.tokens.extend(self._texts.texts(named))
        else:
            summary = streams_pb2.StreamSummary(
                messages=event.generated,
                times=time_messages(event.times),
                finish_reason=event.finish_reason.value,
            )
            response.summary.CopyFrom(summary)
        yield response


def _generated(event: GeneratedToken) -> generation_pb2.GeneratedToken:
    return generation_pb2.GeneratedToken(
        token=token_message(event.token),
        log_probability=event.log_probability,
        entropy_bits=event.entropy_bits,
        top_token_ids=event.top_ids,
        top_probabilities=event.top_probabilities,
        layers=[
            generation_pb2.LayerOutcome(
                layer=read.layer,
                rank=read.rank,
                probability=read.probability,
                log_probability=read.log_probability,
                top_token_ids=read.top_ids,
            )
            for read in event.layers
        ],
    )

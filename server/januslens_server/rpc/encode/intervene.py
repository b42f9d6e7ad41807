"""Encode the events of an Intervene stream as messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from januslens.v1 import intervene_pb2, streams_pb2
from januslens_server.results import (
    ExperimentEffect,
    InterveneEvent,
    InterveneHeader,
    InterveneSummary,
    Outcome,
)
from januslens_server.rpc.encode.messages import (
    ReadToken,
    TokenTexts,
    provenance_message,
    time_messages,
)


class InterveneEncoder:
    """Encodes one stream: numbers its messages and sends the text of each token once."""

    def __init__(self, request_id: str, read_token: ReadToken) -> None:
        """`read_token` returns the token with a vocabulary id."""
        self._request_id = request_id
        self._texts = TokenTexts(read_token)
        self._sequence = itertools.count()

    def encode(self, event: InterveneEvent) -> Iterator[intervene_pb2.InterveneResponse]:
        """Yield the messages of one event, in the order in which they must be sent."""
        if isinstance(event, InterveneHeader):
            header = self._header(event)
            yield self._response(event.before, header=header)
        elif isinstance(event, InterveneSummary):
            times = time_messages(event.times)
            summary = streams_pb2.StreamSummary(messages=event.effects, times=times)
            yield self._response((), summary=summary)
        else:
            for effect in event.effects:
                yield self._response(effect.after, effect=_effect(effect))

    def _response(
        self,
        outcomes: Iterable[Outcome],
        header: streams_pb2.StreamHeader | None = None,
        effect: intervene_pb2.InterventionEffect | None = None,
        summary: streams_pb2.StreamSummary | None = None,
    ) -> intervene_pb2.InterveneResponse:
        named = [i for o in outcomes for i in (o.target_token_id, *o.top_token_ids)]
        return intervene_pb2.InterveneResponse(
            sequence=next(self._sequence),
            header=header,
            effect=effect,
            summary=summary,
            tokens=self._texts.texts(named),
        )

    def _header(self, header: InterveneHeader) -> streams_pb2.StreamHeader:
        return streams_pb2.StreamHeader(
            request_id=self._request_id,
            provenance=provenance_message(header.provenance),
            prompt_tokens=self._texts.of_prompt(header.prompt_tokens),
            positions=header.positions,
            before=map(_outcome, header.before),
            experiments=header.experiments,
            experiments_at_once=header.at_once,
        )


def _effect(effect: ExperimentEffect) -> intervene_pb2.InterventionEffect:
    return intervene_pb2.InterventionEffect(
        experiment=effect.experiment,
        label=effect.label,
        after=map(_outcome, effect.after),
        **asdict(effect.coordinates),
    )


def _outcome(outcome: Outcome) -> streams_pb2.Outcome:
    return streams_pb2.Outcome(**asdict(outcome))

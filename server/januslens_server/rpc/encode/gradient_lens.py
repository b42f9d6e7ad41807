"""Encode the events of a GradientLens as messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from januslens.v1 import gradient_lens_pb2
from januslens_server.results import (
    AttentionGradient,
    Components,
    Entries,
    GradientEvent,
    GradientHeader,
    GradientMatrix,
    GradientSummary,
    LoraGradient,
    MatrixKind,
    NeuronChanges,
    Spectrum,
)
from januslens_server.rpc.encode.messages import (
    Pieces,
    ReadToken,
    TokenTexts,
    level_messages,
    named_tokens,
    projections,
    provenance_message,
    sizes_message,
    tensor_message,
    time_messages,
)

Response = gradient_lens_pb2.GradientLensResponse
MatrixPieces = Pieces[gradient_lens_pb2.GradientMatrix]


class GradientLensEncoder:
    """Encodes one stream; numbers its messages and sends the text of each token once."""

    def __init__(self, request_id: str, read_token: ReadToken) -> None:
        """`read_token` returns the token with a vocabulary id."""
        self._request_id = request_id
        self._texts = TokenTexts(read_token)
        self._sequence = itertools.count()

    def encode(self, event: GradientEvent) -> Iterator[Response]:
        """Yield the messages of one event, in the order in which they must be sent."""
        if isinstance(event, GradientHeader):
            yield Response(sequence=next(self._sequence), header=self._header(event))
        elif isinstance(event, GradientSummary):
            yield Response(sequence=next(self._sequence), summary=_summary(event))
        elif isinstance(event, AttentionGradient):
            for piece in _attention(event):
                yield Response(sequence=next(self._sequence), attention=piece)
        else:
            yield from self._matrix(event)

    def _header(self, header: GradientHeader) -> gradient_lens_pb2.GradientHeader:
        return gradient_lens_pb2.GradientHeader(
            request_id=self._request_id,
            provenance=provenance_message(header.provenance),
            sizes=sizes_message(header.facts),
            prompt_tokens=self._texts.of_prompt(header.prompt_tokens),
            loss=header.loss,
            target_token_ids=header.target_token_ids,
            predicted_token_id=header.predicted_token_id,
            skipped=[_kind(kind) for kind in header.skipped],
            stage_data_types=header.stage_data_types,
            limited_layers=level_messages(header.limited_layers),
            tokens=self._texts.texts([*header.target_token_ids, header.predicted_token_id]),
        )

    def _matrix(self, matrix: GradientMatrix) -> list[Response]:
        """Encode a matrix; every message identifies it, and the last one has the verification."""
        responses: list[Response] = []

        def new() -> gradient_lens_pb2.GradientMatrix:
            responses.append(Response(sequence=next(self._sequence), matrix=_frame(matrix)))
            return responses[-1].matrix

        pieces = Pieces(new, self._texts)
        _add_components(matrix.components, matrix.lora, pieces)
        if matrix.spectrum is not None:
            _add_spectrum(matrix.spectrum, pieces)
        if matrix.neurons is not None:
            _add_neurons(matrix.neurons, pieces)
        ending = responses[-1].matrix
        ending.last = True
        if matrix.verification is not None:
            ending.verification.relative_error = matrix.verification.measured_error
            ending.verification.tolerance = matrix.verification.tolerance
        return responses


# Elements of each of the three tensors in a message; with the rest they stay within 1 MiB.
PIECE_ELEMENTS = (2**20 - 4096) // 12


def _attention(found: AttentionGradient) -> Iterator[gradient_lens_pb2.AttentionGradient]:
    for start in range(0, len(found.pattern), PIECE_ELEMENTS):
        part = slice(start, start + PIECE_ELEMENTS)
        yield gradient_lens_pb2.AttentionGradient(
            layer=found.layer,
            offset=found.offset + start,
            shape=found.shape,
            pattern=tensor_message(found.pattern[part]),
            pattern_gradient=tensor_message(found.pattern_gradient[part]),
            score_gradient=tensor_message(found.score_gradient[part]),
        )


def _frame(matrix: GradientMatrix) -> gradient_lens_pb2.GradientMatrix:
    return gradient_lens_pb2.GradientMatrix(
        layer=matrix.layer,
        kind=_kind(matrix.kind),
        expert=matrix.expert,
        d_in=matrix.d_in,
        d_out=matrix.d_out,
        projected_side=gradient_lens_pb2.GradientFactor.ValueType(matrix.projected_side),
        promoted_end=gradient_lens_pb2.RankingEnd.ValueType(matrix.promoted_end),
        component_count=matrix.component_count,
        frobenius_norm=matrix.frobenius_norm,
        lora=None if matrix.lora is None else _lora(matrix.lora),
    )


def _lora(found: LoraGradient) -> gradient_lens_pb2.LoraGradient:
    return gradient_lens_pb2.LoraGradient(
        rank=found.rank, scale=found.scale, a_norm=found.a_norm, b_norm=found.b_norm
    )


def _kind(kind: MatrixKind) -> gradient_lens_pb2.MatrixKind.ValueType:
    return gradient_lens_pb2.MatrixKind.ValueType(kind)


def _add_components(
    components: Components, lora: LoraGradient | None, pieces: MatrixPieces
) -> None:
    read, named = projections(components.projections), named_tokens(components.projections)
    columns = zip(
        components.positions.tolist(),
        components.input_norms.tolist(),
        components.vjp_norms.tolist(),
        components.predicted_ranks.tolist(),
        components.target_ranks.tolist(),
        _entries(components.other_side),
        strict=True,
    )
    inputs, vjps = components.inputs, components.vjps
    a_vjps = b_inputs = None
    if lora is not None:
        a_vjps, b_inputs = lora.a_vjps, lora.b_inputs
    for i, (position, input_norm, vjp_norm, predicted, targets, entries) in enumerate(columns):
        projected = read[i] is not None
        added = pieces.body().components.add(
            position=position,
            input_norm=input_norm,
            vjp_norm=vjp_norm,
            size=input_norm * vjp_norm,
            projection=read[i],
            predicted_rank=predicted if projected else None,
            target_ranks=targets if projected else (),
            other_side=entries,
            input=None if inputs is None else tensor_message(inputs[i]),
            vjp=None if vjps is None else tensor_message(vjps[i]),
            lora_a_vjp=None if a_vjps is None else tensor_message(a_vjps[i]),
            lora_b_input=None if b_inputs is None else tensor_message(b_inputs[i]),
        )
        pieces.added(added, named[i])


def _add_spectrum(spectrum: Spectrum, pieces: MatrixPieces) -> None:
    columns = zip(
        spectrum.values.tolist(),
        spectrum.explained.tolist(),
        projections(spectrum.projections),
        _entries(spectrum.other_side),
        named_tokens(spectrum.projections),
        strict=True,
    )
    for value, explained, projection, entries, named in columns:
        added = pieces.body().spectrum.add(
            value=value, explained=explained, projection=projection, other_side=entries
        )
        pieces.added(added, named)


def _add_neurons(changes: NeuronChanges, pieces: MatrixPieces) -> None:
    neurons = changes.neurons.tolist()
    tables = [changes.before, changes.change, *([] if changes.after is None else [changes.after])]
    columns = zip(
        neurons,
        changes.change_norms.tolist(),
        projections(changes.before),
        projections(changes.change),
        [None] * len(neurons) if changes.after is None else projections(changes.after),
        zip(*map(named_tokens, tables), strict=True),
        strict=True,
    )
    for neuron, norm, before, change, after, named in columns:
        added = pieces.body().neurons.add(
            neuron=neuron, change_norm=norm, before=before, change=change, after=after
        )
        pieces.added(added, list(itertools.chain.from_iterable(named)))


def _entries(entries: Entries) -> list[list[gradient_lens_pb2.Coordinate]]:
    return [
        [
            gradient_lens_pb2.Coordinate(index=index, value=value)
            for index, value in zip(indices, values, strict=True)
        ]
        for indices, values in zip(entries.indices.tolist(), entries.values.tolist(), strict=True)
    ]


_SEGMENTS = dict(gradient_lens_pb2.PromptSegment.items())


def _summary(summary: GradientSummary) -> gradient_lens_pb2.GradientSummary:
    return gradient_lens_pb2.GradientSummary(
        matrices=summary.matrices,
        times=time_messages(summary.times),
        segments=[
            gradient_lens_pb2.SegmentRow(
                segment=_SEGMENTS[f"PROMPT_SEGMENT_{row.segment.upper()}"],
                layer=row.layer,
                kind=_kind(row.kind),
                mean_vjp_norm=row.mean_vjp_norm,
                mean_target_rank=row.mean_target_rank,
                positions=row.positions,
            )
            for row in summary.segments
        ],
    )

"""The events of a GradientLens as messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf.message import Message

from januslens.v1 import gradient_lens_pb2
from januslens_server.results import (
    Components,
    Entries,
    GradientEvent,
    GradientHeader,
    GradientMatrix,
    GradientSummary,
    Guarantee,
    MatrixKind,
    NeuronChanges,
    ProjectionTable,
    Spectrum,
)
from januslens_server.rpc.encode.shared import (
    Part,
    ReadToken,
    TokenTexts,
    named_tokens,
    projection_messages,
    provenance_message,
    sizes_message,
    tensor_message,
    time_messages,
)

Response = gradient_lens_pb2.GradientLensResponse


class GradientLensEncoder:
    """Encodes one stream: numbers its messages and sends every token's text once."""

    def __init__(self, request_id: str, read_token: ReadToken) -> None:
        """`read_token` looks a vocabulary id up."""
        self._request_id = request_id
        self._texts = TokenTexts(read_token)
        self._sequence = itertools.count()

    def encode(self, event: GradientEvent) -> Iterator[Response]:
        """The messages of one event, in the order in which they must be sent."""
        if isinstance(event, GradientHeader):
            yield Response(sequence=next(self._sequence), header=self._header(event))
        elif isinstance(event, GradientSummary):
            yield Response(sequence=next(self._sequence), summary=_summary(event))
        else:
            for matrix in self._matrices(event):
                yield Response(sequence=next(self._sequence), matrix=matrix)

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
            tokens=self._texts.texts([*header.target_token_ids, header.predicted_token_id]),
        )

    def _matrices(self, matrix: GradientMatrix) -> Iterator[Any]:
        """The fields of `GradientMatrix` messages, which a message would copy once more.

        What says which matrix it is stands in every piece, the verification in the last one.
        """
        pieces = list(self._texts.pieces(list(_parts(matrix))))
        for i, piece in enumerate(pieces, start=1):
            last = i == len(pieces)
            yield {
                "layer": matrix.layer,
                "kind": _kind(matrix.kind),
                "expert": matrix.expert,
                "d_in": matrix.d_in,
                "d_out": matrix.d_out,
                "projected_side": gradient_lens_pb2.Side.ValueType(matrix.projected_side),
                "promoted_end": gradient_lens_pb2.End.ValueType(matrix.promoted_end),
                "component_count": matrix.component_count,
                "frobenius_norm": matrix.frobenius_norm,
                "verification": _verification(matrix.verification) if last else None,
                "last": last,
                **piece,
            }


def _parts(matrix: GradientMatrix) -> Iterator[Part]:
    components = matrix.components
    yield from _named("components", _components(components), components.projections)
    if matrix.spectrum is not None:
        spectrum = matrix.spectrum
        yield from _named("spectrum", _singulars(spectrum), spectrum.projections)
    if matrix.neurons is not None:
        changes = matrix.neurons
        tables = [changes.before, changes.change, changes.after]
        yield from _named("neurons", _neuron_changes(changes), *tables)


def _named(
    field: str, messages: Iterable[Message], *tables: ProjectionTable | None
) -> Iterator[Part]:
    """Messages with the tokens that their rows of all `tables` name."""
    named = [named_tokens(table) for table in tables if table is not None]
    for message, *ids in zip(messages, *named, strict=True):
        yield Part(field, message, list(itertools.chain.from_iterable(ids)))


def _verification(measured: Guarantee | None) -> gradient_lens_pb2.Verification | None:
    if measured is None:
        return None
    return gradient_lens_pb2.Verification(
        relative_error=measured.measured_error, tolerance=measured.tolerance
    )


def _kind(kind: MatrixKind) -> gradient_lens_pb2.MatrixKind.ValueType:
    return gradient_lens_pb2.MatrixKind.ValueType(kind)


def _components(components: Components) -> Iterator[gradient_lens_pb2.Component]:
    projections = projection_messages(components.projections)
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
    for i, (position, input_norm, vjp_norm, predicted, targets, entries) in enumerate(columns):
        projected = projections[i] is not None
        yield gradient_lens_pb2.Component(
            position=position,
            input_norm=input_norm,
            vjp_norm=vjp_norm,
            size=input_norm * vjp_norm,
            projection=projections[i],
            predicted_rank=predicted if projected else None,
            target_ranks=targets if projected else (),
            other_side=entries,
            input=None if inputs is None else tensor_message(inputs[i]),
            vjp=None if vjps is None else tensor_message(vjps[i]),
        )


def _singulars(spectrum: Spectrum) -> Iterator[gradient_lens_pb2.Singular]:
    columns = zip(
        spectrum.values.tolist(),
        spectrum.explained.tolist(),
        projection_messages(spectrum.projections),
        _entries(spectrum.other_side),
        strict=True,
    )
    for value, explained, projection, entries in columns:
        yield gradient_lens_pb2.Singular(
            value=value, explained=explained, projection=projection, other_side=entries
        )


def _neuron_changes(changes: NeuronChanges) -> Iterator[gradient_lens_pb2.NeuronChange]:
    neurons = changes.neurons.tolist()
    after = [None] * len(neurons) if changes.after is None else projection_messages(changes.after)
    columns = zip(
        neurons,
        changes.change_norms.tolist(),
        projection_messages(changes.before),
        projection_messages(changes.change),
        after,
        strict=True,
    )
    for neuron, norm, before, change, then in columns:
        yield gradient_lens_pb2.NeuronChange(
            neuron=neuron, change_norm=norm, before=before, change=change, after=then
        )


def _entries(entries: Entries) -> list[list[gradient_lens_pb2.Entry]]:
    return [
        [
            gradient_lens_pb2.Entry(index=index, value=value)
            for index, value in zip(indices, values, strict=True)
        ]
        for indices, values in zip(entries.indices.tolist(), entries.values.tolist(), strict=True)
    ]


def _summary(summary: GradientSummary) -> gradient_lens_pb2.GradientSummary:
    return gradient_lens_pb2.GradientSummary(
        matrices=summary.matrices,
        times=time_messages(summary.times),
        segments=[
            gradient_lens_pb2.SegmentRow(
                segment=row.segment,
                layer=row.layer,
                kind=_kind(row.kind),
                mean_vjp_norm=row.mean_vjp_norm,
                mean_target_rank=row.mean_target_rank,
                positions=row.positions,
            )
            for row in summary.segments
        ],
    )

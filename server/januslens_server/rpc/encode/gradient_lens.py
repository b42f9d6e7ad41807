"""Encode the events of a GradientLens as messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

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
from januslens_server.rpc.encode.columns import Columns, Parts
from januslens_server.rpc.encode.messages import (
    Pieces,
    Reading,
    ReadToken,
    TokenTexts,
    level_messages,
    provenance_message,
    sizes_message,
    tensor_columns,
    tensor_message,
    time_messages,
    with_body,
)
from januslens_server.rpc.wire import serialized


class GradientLensEncoder:
    """Encodes one stream; numbers its messages and sends the text of each token once."""

    def __init__(self, request_id: str, read_token: ReadToken) -> None:
        """`read_token` returns the token with a vocabulary id."""
        self._request_id = request_id
        self._texts = TokenTexts(read_token)
        self._sequence = itertools.count()

    def encode(self, event: GradientEvent) -> Iterator[bytes]:
        """Yield the messages of one event, in the order in which they must be sent."""
        if isinstance(event, GradientHeader):
            yield serialized(self._response(header=self._header(event)))
        elif isinstance(event, GradientSummary):
            yield serialized(self._response(summary=_summary(event)))
        elif isinstance(event, AttentionGradient):
            for piece in _attention(event):
                yield serialized(self._response(attention=piece))
        else:
            for body in self._matrix(event):
                yield with_body(self._response(), "matrix", body)

    def _response(self, **event: Any) -> gradient_lens_pb2.GradientLensResponse:
        return gradient_lens_pb2.GradientLensResponse(sequence=next(self._sequence), **event)

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
            layers_without_attention_gradients=header.layers_without_attention_gradients,
            tokens=self._texts.texts([*header.target_token_ids, header.predicted_token_id]),
        )

    def _matrix(self, matrix: GradientMatrix) -> list[bytes]:
        """Encode a matrix; every message identifies it, and the last one has the verification."""
        pieces = Pieces(_frame(matrix), self._texts)
        _add_components(matrix.components, matrix.lora, pieces)
        if matrix.spectrum is not None:
            _add_spectrum(matrix.spectrum, pieces)
        if matrix.neurons is not None:
            _add_neurons(matrix.neurons, pieces)
        verification = None
        if matrix.verification is not None:
            verification = gradient_lens_pb2.Verification(
                relative_error=matrix.verification.measured_error,
                tolerance=matrix.verification.tolerance,
            )
        return pieces.messages(
            gradient_lens_pb2.GradientMatrix(last=True, verification=verification)
        )


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
        module=matrix.module,
        projected_side=gradient_lens_pb2.GradientFactor.ValueType(matrix.projected_side or 0),
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


# Components are encoded in groups of about this many bytes, which fit into a CPU's cache.
COLUMN_BYTES = 2**20
# Bytes of a component without its factors.
COMPONENT_BYTES = 512


def _add_components(components: Components, lora: LoraGradient | None, pieces: Pieces) -> None:
    factors = {"input": components.inputs, "vjp": components.vjps}
    if lora is not None:
        factors |= {"lora_a_vjp": lora.a_vjps, "lora_b_input": lora.b_inputs}
    sent = {field: factor for field, factor in factors.items() if factor is not None}
    each = COMPONENT_BYTES + 4 * sum(factor.shape[1] for factor in sent.values())
    at_once = max(1, COLUMN_BYTES // each)
    for start in range(0, len(components.positions), at_once):
        part = slice(start, start + at_once)
        reading = Reading.of(components.projections.rows(part))
        columns = _components(components, part, reading)
        for field, factor in sent.items():
            columns.delimited(field, tensor_columns(factor[part]).cells())
        pieces.extend(Parts(gradient_lens_pb2.GradientMatrix, "components", columns), [reading])


def _components(components: Components, part: slice, reading: Reading) -> Columns:
    """Encode some components, which have this reading, without their factors."""
    input_norms, vjp_norms = components.input_norms[part], components.vjp_norms[part]
    columns = Columns(gradient_lens_pb2.Component, len(input_norms))
    columns.unsigned("position", components.positions[part])
    columns.floats("input_norm", input_norms)
    columns.floats("vjp_norm", vjp_norms)
    with np.errstate(over="ignore"):  # of norms whose product is infinite in float32
        columns.floats("size", input_norms * vjp_norms)
    reading.add_to(columns, "projection")
    columns.unsigned("predicted_rank", components.predicted_ranks[part], reading.projected)
    columns.unsigned_lists("target_ranks", components.target_ranks[part], reading.projected)
    columns.message_lists("other_side", _coordinates(components.other_side, part))
    return columns


def _add_spectrum(spectrum: Spectrum, pieces: Pieces) -> None:
    reading = Reading.of(spectrum.projections)
    columns = Columns(gradient_lens_pb2.Singular, len(spectrum.values))
    columns.floats("value", spectrum.values)
    columns.floats("explained", spectrum.explained)
    reading.add_to(columns, "projection")
    columns.message_lists("other_side", _coordinates(spectrum.other_side))
    pieces.extend(Parts(gradient_lens_pb2.GradientMatrix, "spectrum", columns), [reading])


def _add_neurons(changes: NeuronChanges, pieces: Pieces) -> None:
    tables = {"before": changes.before, "change": changes.change}
    if changes.after is not None:
        tables["after"] = changes.after
    readings = {field: Reading.of(table) for field, table in tables.items()}
    columns = Columns(gradient_lens_pb2.NeuronChange, len(changes.neurons))
    columns.unsigned("neuron", changes.neurons)
    columns.floats("change_norm", changes.change_norms)
    for field, reading in readings.items():
        reading.add_to(columns, field)
    parts = Parts(gradient_lens_pb2.GradientMatrix, "neurons", columns)
    pieces.extend(parts, readings.values())


def _coordinates(entries: Entries, part: slice = slice(None)) -> Columns:
    """Encode the entries of some vectors, those of each vector in order."""
    indices, values = entries.indices[part].ravel(), entries.values[part].ravel()
    columns = Columns(gradient_lens_pb2.Coordinate, len(indices))
    columns.unsigned("index", indices)
    columns.floats("value", values)
    return columns


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
                module=row.module,
                mean_vjp_norm=row.mean_vjp_norm,
                mean_target_rank=row.mean_target_rank,
                positions=row.positions,
            )
            for row in summary.segments
        ],
    )

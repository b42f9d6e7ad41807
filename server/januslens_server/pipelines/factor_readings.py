"""Compute the result of a matrix from its factors: sizes, projections, spectrum, neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from januslens_server.errors import CancelCheck, InvalidRequest
from januslens_server.lens.backward_lens import (
    change_norms,
    descent_changes,
    frobenius_norm,
    largest_entries,
    largest_first,
    lengths,
    spectrum,
)
from januslens_server.models.experts import ExpertMatrices
from januslens_server.models.failures import check_numbers
from januslens_server.models.matrices import Factors, Linear, MatrixKey
from januslens_server.pipelines.metrics import read
from januslens_server.pipelines.resolve import ResolvedGradientLens
from januslens_server.results import (
    Components,
    End,
    Entries,
    Floats,
    GradientMatrix,
    Ints,
    LoraGradient,
    MatrixKind,
    NeuronChanges,
    ProjectionTable,
    SegmentRow,
    Side,
    Spectrum,
)
from januslens_server.specs import LensSpec
from januslens_server.transfer import to_device, to_host

# Number of reported entries of a factor that is not in the residual basis.
ENTRIES = 10

# The outputs of these matrices, and so their VJPs, are in the residual basis. Of all other
# matrices, the inputs are.
WRITES_RESIDUAL = frozenset({MatrixKind.O, MatrixKind.FF2})
# Number of components that are projected together. Few rows take as long as reading the head's
# weights.
ROWS_AT_ONCE = 128
OVER_NEURONS = frozenset({MatrixKind.FF1, MatrixKind.GATE, MatrixKind.UP, MatrixKind.FF2})


class FactorReader:
    """Computes the results of one request's matrices and collects its segment table."""

    def __init__(
        self,
        request: ResolvedGradientLens,
        predicted: int,
        check_cancelled: CancelCheck,
    ) -> None:
        """Report the ranks of the request's targets and of `predicted`, the model's prediction."""
        self._model = request.model
        self._spec = request.spec
        self._ranked = [*request.objective.targets, predicted]
        self._segments = request.segments
        self._check_cancelled = check_cancelled
        self.segment_rows: list[SegmentRow] = []

    def batches(self, factors: Mapping[MatrixKey, Factors]) -> Iterator[list[MatrixKey]]:
        """Yield the matrices in order, in batches that are projected together."""
        batch: list[MatrixKey] = []
        rows = 0
        for key, found in factors.items():
            added = len(self._chosen(found))
            if batch and rows + added > ROWS_AT_ONCE:
                yield batch
                batch, rows = [], 0
            batch.append(key)
            rows += added
        if batch:
            yield batch

    @torch.inference_mode()
    def matrices(self, batch: Mapping[MatrixKey, Factors]) -> list[GradientMatrix]:
        """Return the results of a batch; its components are projected together.

        `check_cancelled` is called before every chunk of rows.
        """
        orders = [self._chosen(factors) for factors in batch.values()]
        table = self._project(
            torch.cat(
                [
                    self._residual_side(key, factors)[order]
                    for (key, factors), order in zip(batch.items(), orders, strict=True)
                ]
            ),
            self._ranked,
        )
        records, start = [], 0
        for (key, factors), order in zip(batch.items(), orders, strict=True):
            rows = table.rows(slice(start, start + len(order)))
            records.append(self._matrix(key, factors, order, rows))
            start += len(order)
        return records

    def _chosen(self, factors: Factors) -> torch.Tensor:
        """Return the positions `[k]` of the components to report, largest first."""
        return largest_first(factors.inputs.float(), factors.vjps.float(), self._spec.components)

    def _matrix(
        self, key: MatrixKey, factors: Factors, order: torch.Tensor, table: ProjectionTable
    ) -> GradientMatrix:
        """Return the result of one matrix; `table` has the projections of its components."""
        layer, kind, expert = key
        inputs, vjps = factors.inputs.float(), factors.vjps.float()
        side = self._side(key)
        residual = self._residual_side(key, factors)
        outside = inputs if side is Side.VJP else vjps
        if expert is None:  # experts do not have all positions
            self._add_segment_rows(key, residual, vjps)
        chosen = inputs[order], vjps[order]
        size, *numbers = _on_host(
            frobenius_norm(inputs, vjps),
            factors.positions[order],
            *(lengths(vectors).float() for vectors in chosen),
            *largest_entries(outside[order], ENTRIES),
            *(chosen if self._spec.include_factors else ()),
        )
        norm = float(size)
        check_numbers("gradients of this loss", np.array([norm], np.float32))
        return GradientMatrix(
            layer=layer,
            kind=MatrixKind.MODULE if isinstance(kind, str) else kind,
            module=kind if isinstance(kind, str) else "",
            expert=expert,
            d_in=inputs.shape[1],
            d_out=vjps.shape[1],
            projected_side=side,
            promoted_end=End.BOTTOM if side is Side.VJP else End.UNSPECIFIED,
            components=_components(table, *numbers),
            component_count=len(inputs),
            frobenius_norm=norm,
            spectrum=self._spectrum(inputs, vjps, side),
            neurons=None if side is None else self._neurons(key, residual, outside),
            lora=self._lora(key, factors, order),
        )

    def _lora(self, key: MatrixKey, factors: Factors, order: torch.Tensor) -> LoraGradient | None:
        """Return the gradients of the matrix's LoRA, or None."""
        matrix = self._model.view.matrix(key)
        found = matrix.lora_factors(factors) if isinstance(matrix, Linear) else None
        if found is None or not isinstance(matrix, Linear) or matrix.lora is None:
            return None
        a, b = found
        a_norm, b_norm, *sent = _on_host(
            frobenius_norm(a.inputs, a.vjps),
            frobenius_norm(b.inputs, b.vjps),
            *((a.vjps[order], b.inputs[order]) if self._spec.include_factors else ()),
        )
        return LoraGradient(
            rank=matrix.lora.rank,
            scale=matrix.lora.scale,
            a_norm=float(a_norm),
            b_norm=float(b_norm),
            a_vjps=sent[0] if sent else None,
            b_inputs=sent[1] if sent else None,
        )

    def _spectrum(
        self, inputs: torch.Tensor, vjps: torch.Tensor, side: Side | None
    ) -> Spectrum | None:
        if not self._spec.spectrum_rank:
            return None
        found = spectrum(inputs, vjps, self._spec.spectrum_rank)
        both = found.vjps.float(), found.inputs.float()
        residual, outside = both if side is Side.VJP else both[::-1]
        if side is None:
            residual = self._nothing(len(found.values))
        values, explained, *entries = _on_host(
            found.values.float(), found.explained.float(), *largest_entries(outside, ENTRIES)
        )
        return Spectrum(
            values=values,
            explained=explained,
            projections=self._project(residual, self._ranked),
            other_side=Entries(*entries),
        )

    def _neurons(
        self, key: MatrixKey, residual: torch.Tensor, outside: torch.Tensor
    ) -> NeuronChanges | None:
        """Return the neurons that a descent step changes most; the default learning rate is 1."""
        if not self._spec.neurons or key[1] not in OVER_NEURONS:
            return None
        rate = self._spec.learning_rate
        norms = change_norms(outside, residual)
        order = norms.sort(descending=True, stable=True).indices[: self._spec.neurons]
        changes = descent_changes(outside, residual, order, 1.0 if rate is None else rate)
        largest, sizes, overflowing = _on_host(
            order, lengths(changes).float(), changes.norm(dim=-1)
        )
        if not np.isfinite(overflowing).all():
            raise InvalidRequest(
                "learning_rate", "learning rate too large: the neurons' changes overflow float32"
            )
        before = self._neuron_rows(key, order)
        return NeuronChanges(
            neurons=largest,
            change_norms=sizes,
            before=self._project(before, self._ranked),
            change=self._project(changes, self._ranked),
            after=None if rate is None else self._project(before + changes, self._ranked),
        )

    def _neuron_rows(self, key: MatrixKey, neurons: torch.Tensor) -> torch.Tensor:
        """Return the neurons' columns of FF1, GATE or UP, or rows of FF2, `[k, d_model]`."""
        _, kind, expert = key
        matrix = self._model.view.matrix(key)
        weight = matrix.weight if isinstance(matrix, Linear) else matrix.weight_of(expert or 0)
        own = neurons.to(weight.device)
        rows = weight[own] if kind in WRITES_RESIDUAL else weight[:, own].T
        return rows.to(neurons.device).float()

    def _add_segment_rows(self, key: MatrixKey, residual: torch.Tensor, vjps: torch.Tensor) -> None:
        if not self._segments:
            return
        lens = LensSpec(top_k=0, bottom_k=0, kind=self._spec.lens.kind)
        table = self._project(residual, self._ranked, lens)
        (norms,) = _on_host(lengths(vjps).float())
        for segment, positions in self._segments.items():
            ranks = table.target_ranks[positions, 0][table.projected[positions]]
            self.segment_rows.append(
                SegmentRow(
                    segment=segment.value,
                    layer=key[0],
                    kind=MatrixKind.MODULE if isinstance(key[1], str) else key[1],
                    module=key[1] if isinstance(key[1], str) else "",
                    mean_vjp_norm=float(norms[positions].mean()),
                    mean_target_rank=float(ranks.mean()) if len(ranks) else None,
                    positions=len(positions),
                )
            )

    def _side(self, key: MatrixKey) -> Side | None:
        """Return the side of a matrix that is in the residual basis, or None."""
        layer, kind, _ = key
        if isinstance(kind, str):
            return self._model.view.blocks[layer].maps[kind].side
        matrix = self._model.view.matrix(key)
        if isinstance(matrix, ExpertMatrices) and not matrix.in_residual_basis:
            return None
        return Side.VJP if kind in WRITES_RESIDUAL else Side.INPUT

    def _residual_side(self, key: MatrixKey, factors: Factors) -> torch.Tensor:
        """Return the factors in the residual basis `[n, d_model]` in float32, or zeros."""
        side = self._side(key)
        if side is None:
            return self._nothing(len(factors.inputs))
        return (factors.vjps if side is Side.VJP else factors.inputs).float()

    def _nothing(self, count: int) -> torch.Tensor:
        """Return vectors `[count, d_model]` that are not projected."""
        return torch.zeros(count, self._model.view.facts.d_model, device=self._model.device)

    def _project(
        self, vectors: torch.Tensor, ranked: Sequence[int], lens: LensSpec | None = None
    ) -> ProjectionTable:
        targets = to_device(ranked, vectors.device).expand(len(vectors), -1)
        lens = lens or self._spec.lens
        return read(self._model.view.lens, vectors, lens, targets, self._check_cancelled)


def _components(
    table: ProjectionTable,
    positions: Ints,
    input_norms: Floats,
    vjp_norms: Floats,
    indices: Ints,
    values: Floats,
    inputs: Floats | None = None,
    vjps: Floats | None = None,
) -> Components:
    return Components(
        positions=positions,
        input_norms=input_norms,
        vjp_norms=vjp_norms,
        projections=table,
        predicted_ranks=table.target_ranks[:, -1],
        target_ranks=table.target_ranks[:, :-1],
        other_side=Entries(indices, values),
        inputs=inputs,
        vjps=vjps,
    )


def _on_host(*tensors: torch.Tensor) -> list[Any]:
    """Return tensors as arrays, in one copy from a GPU."""
    return [tensor.numpy() for tensor in to_host(*tensors)]

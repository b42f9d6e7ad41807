"""Weight matrices: reading them wherever they are stored, and the factors of their gradients.

accelerate keeps offloaded weights on the CPU or on disk and loads a module's for its forward pass
alone. Between calls such parameters are on the meta device and hold no values, so that everything
here reads parameters with `read_tensor` and `read_parameter`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.capture.taps import Columns, rows, select
from januslens_server.results import MatrixKind

# Layer, kind, and the expert whose matrix it is (None: the layer's only one).
MatrixKey = tuple[int, MatrixKind, int | None]


@dataclass(frozen=True)
class Factors:
    """Inputs `[n, d_in]` and VJPs `[n, d_out]` at `positions` `[n]`: dL/dW = inputs^T vjps.

    Inputs come in the model's data type, VJPs in float32, converted from the model's. An expert
    has a row for each position that was sent to it.
    """

    inputs: torch.Tensor
    vjps: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device) -> Factors:
        """The same factors where the lens reads them."""
        return Factors(self.inputs.to(device), self.vjps.to(device), self.positions.to(device))


@dataclass(frozen=True)
class Linear:
    """One linear map of the model, possibly some `columns` of a fused module.

    `stored_as_rows` is True where the module keeps `[d_in, d_out]` (transformers' Conv1D) and
    False where it keeps the transpose (`nn.Linear`). `overwritten` where the model writes to the
    module's output in place: it is then handed a copy.
    """

    module: nn.Module
    stored_as_rows: bool
    columns: Columns | None = None
    overwritten: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """`W: [d_in, d_out]`, a view of the resident parameter."""
        return self.rows_of(self.parameter())

    @property
    def bias(self) -> torch.Tensor | None:
        """`b: [d_out]`, or None."""
        bias = read_tensor(self.module, "bias")
        return None if bias is None else self.select(bias)

    def select(self, whole: torch.Tensor) -> torch.Tensor:
        """This map's columns of a tensor `[..., features]` of the whole module."""
        return select(whole, self.columns)

    @property
    def input(self) -> Tap:
        """Where `x: [batch, pos, d_in]` is read."""
        return Tap(self.module, End.INPUT)

    @property
    def output(self) -> Tap:
        """Where `y: [batch, pos, d_out]` is read."""
        return Tap(self.module, End.OUTPUT, self.columns, overwritten=self.overwritten)

    @property
    def whole(self) -> Tap:
        """The module's whole output, of which `output` is some columns: what VJPs arrive at."""
        return Tap(self.module, End.OUTPUT, overwritten=self.overwritten)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What must be captured for `factors`."""
        return (self.input, self.whole)

    def factors(
        self, captured: Mapping[Tap, torch.Tensor], vjps: torch.Tensor
    ) -> dict[int | None, Factors]:
        """The gradient's factors from dL/d(whole) `[pos, features]`; of no expert."""
        inputs = rows(captured[self.input]).detach()
        positions = torch.arange(len(inputs), device=inputs.device)
        return {None: Factors(inputs, self.select(vjps), positions)}

    def parameter(self) -> torch.Tensor:
        """The resident parameter that holds the map."""
        return read_parameter(self.module, "weight")

    def rows_of(self, stored: torch.Tensor, _expert: int | None = None) -> torch.Tensor:
        """This map's `[d_in, d_out]` of a tensor stored as the parameter is."""
        return self.select(stored if self.stored_as_rows else stored.T)

    @cached_property
    def row_norms(self) -> torch.Tensor:
        """Euclidean norm `[d_in]` of each row of W, float32, computed once per model."""
        norms: torch.Tensor = self.weight.detach().float().norm(dim=1)
        return norms


def read_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """The module's own parameter with its numbers, where it computes; None: there is none."""
    with align_module_device(module):
        tensor: torch.Tensor | None = getattr(module, name, None)
        return tensor


def read_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """As `read_tensor`, of a parameter that must be there."""
    with align_module_device(module):
        return module.get_parameter(name)


@contextmanager
def brought(network: PreTrainedModel) -> Iterator[None]:
    """Inside, all parameters that views are made of have their numbers.

    These are the head and what stands around it, and the blocks' norms and other vectors. The
    blocks' matrices are read one by one when they are needed, the embedding not at all. The model
    may run.
    """
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    in_blocks = {module for blocks in lists for module in blocks.modules()}
    embedding = network.get_input_embeddings()
    with ExitStack() as stack:
        for module in network.modules():
            wanted = _holds_vectors(module) if module in in_blocks else module is not embedding
            if wanted:
                stack.enter_context(held(module))
        yield


def _holds_vectors(module: nn.Module) -> bool:
    """Whether it has no matrix; norms of queries and keys may have a row for each head."""
    is_norm = "norm" in type(module).__name__.lower()
    return is_norm or all(p.dim() < 2 for p in module.parameters(recurse=False))


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters have their numbers and keep them through its forward."""
    if not has_offloaded_params(module):
        yield
        return
    hook: Any = module._hf_hook  # noqa: SLF001 - accelerate has no other way to say it
    with align_module_device(module):
        hook.offload = False
        try:
            yield
        finally:
            hook.offload = True

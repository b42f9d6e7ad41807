"""Weight matrices: how they are stored, read and captured, and the factors of their gradients.

accelerate keeps offloaded weights on the CPU or on disk and loads those of one module during its
forward pass. Between calls such parameters are on the meta device and hold no values. Read them
with `read_tensor` and `read_parameter`.
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
from transformers.pytorch_utils import Conv1D

from januslens_server.capture import End, Tap
from januslens_server.capture.hooks import Columns, rows, select
from januslens_server.errors import ModelFailed
from januslens_server.results import MatrixKind, Side

# Layer, kind or name of a module, and expert; the expert is None in a layer without experts.
MatrixKey = tuple[int, MatrixKind | str, int | None]


@dataclass(frozen=True)
class Factors:
    """The factors of one matrix's gradient: `dL/dW = inputs^T vjps`.

    `inputs` `[n, d_in]` are in the model's data type, `vjps` `[n, d_out]` in float32, and
    `positions` `[n]` are the prompt positions of the rows. An expert has one row for each position
    that is routed to it. Source: Backward Lens, section 4.1, equation 8.
    """

    inputs: torch.Tensor
    vjps: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device) -> Factors:
        """Copy the factors to another device."""
        return Factors(self.inputs.to(device), self.vjps.to(device), self.positions.to(device))


@dataclass(frozen=True)
class LoraPair:
    """The matrices of a LoRA: a map's weight `[d_out, d_in]` grows by `scale * up @ down`.

    `down` is `[rank, d_in]` (PEFT's A), `up` is `[d_out, rank]` (B).
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Width between the two matrices."""
        return self.down.shape[0]

    def check_shapes(self, module: nn.Module) -> None:
        """Raise `ModelFailed` if a linear module has other inputs or outputs than the LoRA."""
        weight = module.get_parameter("weight")
        d_out, d_in = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
        if (d_in, d_out) != (self.down.shape[1], self.up.shape[0]):
            raise ModelFailed(
                f"the LoRA has A {list(self.down.shape)} and B {list(self.up.shape)} for a map of "
                f"{d_in} inputs and {d_out} outputs"
            )

    def attach(self, module: nn.Module) -> None:
        """Let a linear module of the same shapes add the LoRA to what it computes."""
        weight = module.get_parameter("weight")
        changed: Any = module
        changed.__class__ = LoraConv1D if isinstance(module, Conv1D) else LoraLinear
        changed.lora = LoraPair(self.down.to(weight), self.up.to(weight), self.scale)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the LoRA adds to the output of a map with these inputs `[..., d_in]`."""
        return self.scale * (inputs @ self.down.T @ self.up.T)


class LoraLinear(nn.Linear):
    """A linear module with a LoRA."""

    lora: LoraPair

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Compute the map of `W + scale * up @ down`."""
        return super().forward(input) + self.lora(input)


class LoraConv1D(Conv1D):
    """A linear module of GPT-2, which stores the transposed weight, with a LoRA."""

    lora: LoraPair

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map of `W + scale * up @ down`."""
        whole: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return whole + self.lora(x)


@dataclass(frozen=True)
class Linear:
    """One linear map of the model: a module, or some output `columns` of a fused module.

    `stored_as_rows` is True if the module stores `[d_in, d_out]` (transformers' Conv1D) and False
    if it stores the transpose (`nn.Linear`). `overwritten` is True if the model modifies the
    module's output in place; capture then keeps the original and passes on a copy.
    """

    module: nn.Module
    stored_as_rows: bool
    columns: Columns | None = None
    overwritten: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """`W: [d_in, d_out]`, a view of the model's parameter, or with the LoRA added."""
        if self.lora is None:
            return self.rows_of(self.parameter())
        added = self.lora.scale * (self.lora.down.T @ self.lora.up.T)
        return self.rows_of(self.parameter()) + self.select(added)

    @property
    def lora(self) -> LoraPair | None:
        """The LoRA of the whole module, or None."""
        return self.module.lora if isinstance(self.module, LoraLinear | LoraConv1D) else None

    @property
    def bias(self) -> torch.Tensor | None:
        """`b: [d_out]`, or None."""
        bias = read_tensor(self.module, "bias")
        return None if bias is None else self.select(bias)

    @property
    def d_in(self) -> int:
        """Width of the map's input."""
        return self.module.get_parameter("weight").shape[0 if self.stored_as_rows else 1]

    @property
    def d_out(self) -> int:
        """Width of the map's output."""
        whole = self.module.get_parameter("weight").shape[1 if self.stored_as_rows else 0]
        return whole if self.columns is None else len(self.columns)

    def select(self, whole: torch.Tensor) -> torch.Tensor:
        """Select this map's columns of a tensor `[..., features]` of the whole module."""
        return select(whole, self.columns)

    @property
    def input(self) -> Tap:
        """Tap of the map's input `x: [batch, pos, d_in]`."""
        return Tap(self.module, End.INPUT)

    @property
    def output(self) -> Tap:
        """Tap of the map's output `y: [batch, pos, d_out]`."""
        return Tap(self.module, End.OUTPUT, self.columns, overwritten=self.overwritten)

    @property
    def whole(self) -> Tap:
        """Tap of the module's whole output; `factors` takes its VJPs."""
        return Tap(self.module, End.OUTPUT, overwritten=self.overwritten)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Taps that `factors` needs."""
        return (self.input, self.whole)

    def lora_factors(self, factors: Factors) -> tuple[Factors, Factors] | None:
        """Factors of the gradients of a LoRA's A and B, from those of this map; None without LoRA.

        With `y = x W + s (x A^T) B^T`, A `[r, d_in]` and B `[d_out, r]`, the gradients are
        `dL/dA = sum_i (s delta_i B)^T x_i` and `dL/dB = sum_i delta_i^T (s x_i A^T)`. Of a fused
        module, they are the part that passes through this map.
        """
        pair = self.lora
        if pair is None:
            return None
        inputs, vjps = factors.inputs.float(), factors.vjps.float()
        up = self.select(pair.up.T.float()).T
        a = Factors(inputs, pair.scale * vjps @ up, factors.positions)
        b = Factors(pair.scale * inputs @ pair.down.T.float(), vjps, factors.positions)
        return a, b

    def factors(
        self, captured: Mapping[Tap, torch.Tensor], vjps: torch.Tensor
    ) -> dict[int | None, Factors]:
        """Factors of the gradient, from dL/d(whole) `[pos, features]`; their expert is None."""
        inputs = rows(captured[self.input]).detach()
        positions = torch.arange(len(inputs), device=inputs.device)
        return {None: Factors(inputs, self.select(vjps), positions)}

    def parameter(self) -> torch.Tensor:
        """The model's parameter that contains the map, without its LoRA."""
        return read_parameter(self.module, "weight")

    def rows_of(self, stored: torch.Tensor, _expert: int | None = None) -> torch.Tensor:
        """This map's `[d_in, d_out]` in a tensor with the parameter's layout."""
        return self.select(stored if self.stored_as_rows else stored.T)

    @cached_property
    def row_norms(self) -> torch.Tensor:
        """Euclidean norm `[d_in]` of each row of W, float32, computed once per model."""
        norms: torch.Tensor = self.weight.detach().float().norm(dim=1)
        return norms


@dataclass(frozen=True)
class ModuleMap:
    """A linear map that requests name by its module, and its side in the residual basis.

    `side` is None if neither its input nor its output is in the residual basis.
    """

    linear: Linear
    side: Side | None


def read_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """The module's tensor `name` with its values, on the device where it computes, or None."""
    with align_module_device(module):
        tensor: torch.Tensor | None = getattr(module, name, None)
        return tensor


def read_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """The module's parameter `name` with its values, on the device where it computes.

    Raises `AttributeError` if the module has no such parameter.
    """
    with align_module_device(module):
        return module.get_parameter(name)


@contextmanager
def loaded_vectors(network: PreTrainedModel) -> Iterator[None]:
    """Load every offloaded parameter that views are made of, for the duration of the context.

    These are the output head, the modules outside the blocks, and the blocks' norms and other
    vectors. Matrices of blocks are read one by one when they are needed; the embedding is never
    read. The model can run inside the context.
    """
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    in_blocks = {module for blocks in lists for module in blocks.modules()}
    embedding = network.get_input_embeddings()
    with ExitStack() as stack:
        for module in network.modules():
            wanted = _holds_vectors(module) if module in in_blocks else module is not embedding
            if wanted:
                stack.enter_context(loaded_weights(module))
        yield


def _holds_vectors(module: nn.Module) -> bool:
    """Whether a module has no matrix. Norms of queries and keys may have a row for each head."""
    is_norm = "norm" in type(module).__name__.lower()
    return is_norm or all(p.dim() < 2 for p in module.parameters(recurse=False))


@contextmanager
def loaded_weights(module: nn.Module) -> Iterator[None]:
    """Load a module's offloaded parameters, also through its forward pass, inside the context."""
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

"""Find attention and MLP in a block, from the tensors that its modules exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from januslens_server.capture import End, Rotation, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.weights import Finish, HeadMap, HeadNorm, QueryScaling, Scoring
from januslens_server.models.adapters.observed_pass import (
    ModuleCall,
    ObservedPass,
    epsilon,
    is_norm,
    read_norm,
    same_memory,
)
from januslens_server.models.matrices import Linear
from januslens_server.models.views import Attention, Block, Mlp


@dataclass(frozen=True)
class BlockSettings:
    """Properties of a block that come from the configuration, because no tensor shows them."""

    n_heads: int
    soft_cap: float | None
    query_scaling: QueryScaling | None
    residual_multiplier: float


class BlockFinder:
    """Map one block from the calls of its modules in an observed pass."""

    def __init__(self, name: str, module: nn.Module, observed: ObservedPass) -> None:
        """Find the linear maps. `name` is the block's name in the model.

        Raises `ModelFailed` if the block was not called or has other linear maps than expected.
        """
        self._name = name
        self._module = module
        self._calls = observed.inside(name)
        block = observed.of(module)
        if block is None:
            raise ModelFailed(f"{name} is not called in a forward pass")
        self._input = block.input
        linears = [e for e in self._calls if isinstance(e.module, nn.Linear | Conv1D)]
        self._attention, self._mlp = self._split(linears)

    def block(
        self,
        settings: BlockSettings,
        rotation: Callable[[int], Rotation] | None,
        window: int | None,
    ) -> Block:
        """Build the block, with this `rotation` and `window` of its attention."""
        query, *_, output = self._attention
        first, second = self._mlp[0], self._mlp[-1]
        attention_norm = self._norm_giving(query.input)
        mlp_norm = self._norm_giving(first.input)
        parallel = same_memory(first.input, query.input) or (
            mlp_norm is not None and same_memory(mlp_norm.input, self._input)
        )
        middle = None if parallel else self._middle(mlp_norm, first)
        return Block(
            module=self._module,
            attention=self._read_attention(settings, rotation, window, output),
            mlp=self._read_mlp(settings, second),
            residual_mid=middle,
            attention_prenorm=attention_norm is not None,
            mlp_prenorm=mlp_norm is not None,
        )

    @property
    def query_width(self) -> int:
        """Width of all heads' queries together."""
        return self._attention[0].output.shape[-1]

    def _split(self, linears: Sequence[ModuleCall]) -> tuple[list[ModuleCall], list[ModuleCall]]:
        """Split linear maps into query, key, value and output, and the MLP's two or three maps."""
        if len(linears) not in {6, 7}:
            found = ", ".join(linear.name for linear in linears)
            raise ModelFailed(
                f"{self._name} has {len(linears)} linear maps ({found}): expected 6 or 7, for "
                "query, key, value, output and the MLP's two or three"
            )
        attention, mlp = list(linears[:4]), list(linears[4:])
        if not all(same_memory(e.input, attention[0].input) for e in attention[1:3]):
            raise ModelFailed(f"query, key and value of {self._name} have different inputs")
        return attention, mlp

    def _read_attention(
        self,
        settings: BlockSettings,
        rotation: Callable[[int], Rotation] | None,
        window: int | None,
        output: ModuleCall,
    ) -> Attention:
        query, key, value, _ = (_linear(call.module) for call in self._attention)
        d_head = self.query_width // settings.n_heads
        owner = self._owner(self._attention[0])
        finish, added = self._finish(settings, output)
        return Attention(
            query=query,
            key=key,
            value=value,
            output=_linear(output.module),
            n_heads=settings.n_heads,
            n_kv_heads=self._attention[1].output.shape[-1] // d_head,
            scoring=Scoring(
                scale=getattr(owner, "scaling", None) or d_head**-0.5,
                soft_cap=settings.soft_cap,
                sinks=getattr(owner, "sinks", None),
                window=window,
                query_scaling=settings.query_scaling,
            ),
            rotation=rotation,
            query_map=self._head_map(self._attention[0], d_head),
            key_map=self._head_map(self._attention[1], d_head),
            query_norm=self._norm_tap(self._attention[0]),
            key_norm=self._norm_tap(self._attention[1]),
            finish=finish,
            added=added,
        )

    def _read_mlp(self, settings: BlockSettings, second: ModuleCall) -> Mlp:
        finish, added = self._finish(settings, second)
        ff2 = _linear(second.module)
        if len(self._mlp) == 2:
            return Mlp(_linear(self._mlp[0].module), ff2, finish=finish, added=added)
        gate, up = self._gate_and_up()
        return Mlp(_linear(gate.module), ff2, up=_linear(up.module), finish=finish, added=added)

    def _gate_and_up(self) -> tuple[ModuleCall, ModuleCall]:
        """Order the first two maps of a gated MLP: an activation module reads the gate's output."""
        one, other, _ = self._mlp
        for call in self._calls:
            if isinstance(call.module, nn.Linear | Conv1D) or is_norm(call.module):
                continue
            if not list(call.module.children()):
                if same_memory(call.input, one.output):
                    return one, other
                if same_memory(call.input, other.output):
                    return other, one
        raise ModelFailed(f"no activation follows {one.name} or {other.name}: expected a gated MLP")

    def _head_map(self, call: ModuleCall, d_head: int) -> HeadMap:
        """Map the norm that reads a query's or key's linear result, if there is one."""
        norm = self._norm_of(call)
        if norm is None:
            return HeadMap()
        spans = norm.module.get_parameter("weight").numel() != d_head
        return HeadMap(norm=_head_norm(norm, d_head, spans_heads=spans))

    def _norm_tap(self, call: ModuleCall) -> Tap | None:
        """Return the tap of that norm's output. Strides show if heads come before positions."""
        norm = self._norm_of(call)
        if norm is None:
            return None
        given = norm.input
        heads_first = given.dim() == 4 and given.stride(1) < given.stride(2)
        return Tap(norm.module, End.OUTPUT, heads_first=heads_first)

    def _norm_of(self, call: ModuleCall) -> ModuleCall | None:
        return next((e for e in self._norms() if same_memory(e.input, call.output)), None)

    def _finish(
        self, settings: BlockSettings, result: ModuleCall
    ) -> tuple[Finish | None, Tap | None]:
        """Map a norm that reads a sublayer's result, or the model's residual multiplier."""
        for norm in self._norms():
            if same_memory(norm.input, result.output) and norm.input.shape == result.output.shape:
                return Finish(norm=read_norm(norm)), Tap(norm.module, End.OUTPUT)
        if settings.residual_multiplier != 1.0:
            return Finish(multiplier=settings.residual_multiplier), None
        return None, None

    def _middle(self, mlp_norm: ModuleCall | None, first: ModuleCall) -> Tap:
        if mlp_norm is not None:
            return Tap(mlp_norm.module, End.INPUT)
        return Tap(first.module, End.INPUT)

    def _norm_giving(self, tensor: torch.Tensor) -> ModuleCall | None:
        return next((e for e in self._norms() if same_memory(e.output, tensor)), None)

    def _norms(self) -> list[ModuleCall]:
        return [call for call in self._calls if is_norm(call.module)]

    def _owner(self, call: ModuleCall) -> Any:
        """Return the module that contains a linear map: the attention."""
        local = call.name.removeprefix(f"{self._name}.").rpartition(".")[0]
        return self._module.get_submodule(local)


def _linear(module: nn.Module) -> Linear:
    return Linear(module, stored_as_rows=isinstance(module, Conv1D))


def _head_norm(call: ModuleCall, d_head: int, *, spans_heads: bool) -> HeadNorm:
    """Map a norm of queries or keys."""
    norm = read_norm(call)
    if spans_heads and (norm.centred or norm.bias is not None):
        raise ModelFailed(f"{call.name} is not an RMSNorm: expected one for a norm over all heads")
    weight = norm.weight.unflatten(0, (-1, d_head)) if spans_heads else norm.weight
    return HeadNorm(weight, epsilon(call.module), norm.centred, spans_heads, norm.bias)

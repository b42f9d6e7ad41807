"""Find attention and MLP in a block, from the tensors that its modules exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from januslens_server.capture import End, Rotation, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.weights import Finish, HeadMap, HeadNorm, QueryScaling, Scoring
from januslens_server.models.adapters.observed_mlp import (
    FoundMlp,
    dense_mlp,
    find_experts,
    is_linear,
    linear,
)
from januslens_server.models.adapters.observed_pass import (
    ModuleCall,
    ObservedPass,
    epsilon,
    is_norm,
    read_norm,
    same_memory,
)
from januslens_server.models.views import Attention, Block


@dataclass(frozen=True)
class BlockSettings:
    """Properties of a block that come from the configuration, because no tensor shows them."""

    n_heads: int
    soft_cap: float | None
    query_scaling: QueryScaling | None
    residual_multiplier: float


class BlockFinder:
    """Map one block from the calls of its modules in an observed pass."""

    def __init__(
        self, name: str, module: nn.Module, observed: ObservedPass, config: PreTrainedConfig
    ) -> None:
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
        self._attention, self._mlp = self._split(config)

    def block(
        self,
        settings: BlockSettings,
        rotation: Callable[[int], Rotation] | None,
        window: int | None,
    ) -> Block:
        """Build the block, with this `rotation` and `window` of its attention."""
        query, *_, output = self._attention
        attention_norm = self._norm_giving(query.input)
        mlp_norm = self._norm_giving(self._mlp.input)
        parallel = same_memory(self._mlp.input, query.input) or (
            mlp_norm is not None and same_memory(mlp_norm.input, self._input)
        )
        reader = self._mlp.reader if mlp_norm is None else mlp_norm.module
        finish, added = self._finish(settings, self._mlp.result)
        return Block(
            module=self._module,
            attention=self._read_attention(settings, rotation, window, output),
            mlp=replace(self._mlp.parts, finish=finish, added=added),
            residual_mid=None if parallel else Tap(reader, End.INPUT),
            attention_prenorm=attention_norm is not None,
            mlp_prenorm=mlp_norm is not None,
        )

    @property
    def query_width(self) -> int:
        """Width of all heads' queries together."""
        return self._attention[0].output.shape[-1]

    def _split(self, config: PreTrainedConfig) -> tuple[list[ModuleCall], FoundMlp]:
        """Split linear maps into query, key, value and output, and those of the MLP."""
        linears = [call for call in self._calls if is_linear(call)]
        experts = find_experts(self._name, self._calls, config)
        if experts is None:
            attention, rest = linears[:4], linears[4:]
        else:
            attention = [e for e in linears if not e.name.startswith(f"{experts.name}.")]
            rest = []
        if len(attention) != 4 or (experts is None and len(rest) not in {2, 3}):
            found = ", ".join(call.name for call in linears)
            raise ModelFailed(
                f"{self._name} has {len(linears)} linear maps ({found}): expected query, key, "
                "value, output and two or three of an MLP"
            )
        if not all(same_memory(e.input, attention[0].input) for e in attention[1:3]):
            raise ModelFailed(f"query, key and value of {self._name} have different inputs")
        return attention, experts or dense_mlp(rest, self._calls, config)

    def _read_attention(
        self,
        settings: BlockSettings,
        rotation: Callable[[int], Rotation] | None,
        window: int | None,
        output: ModuleCall,
    ) -> Attention:
        query, key, value, _ = map(linear, self._attention)
        d_head = self.query_width // settings.n_heads
        owner = self._owner(self._attention[0])
        finish, added = self._finish(settings, output)
        return Attention(
            query=query,
            key=key,
            value=value,
            output=linear(output),
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

    def _norm_giving(self, tensor: torch.Tensor) -> ModuleCall | None:
        return next((e for e in self._norms() if same_memory(e.output, tensor)), None)

    def _norms(self) -> list[ModuleCall]:
        return [call for call in self._calls if is_norm(call.module)]

    def _owner(self, call: ModuleCall) -> Any:
        """Return the module that contains a linear map: the attention."""
        local = call.name.removeprefix(f"{self._name}.").rpartition(".")[0]
        return self._module.get_submodule(local)


def _head_norm(call: ModuleCall, d_head: int, *, spans_heads: bool) -> HeadNorm:
    """Map a norm of queries or keys."""
    norm = read_norm(call)
    if spans_heads and (norm.centred or norm.bias is not None):
        raise ModelFailed(f"{call.name} is not an RMSNorm: expected one for a norm over all heads")
    weight = norm.weight.unflatten(0, (-1, d_head)) if spans_heads else norm.weight
    return HeadNorm(weight, epsilon(call.module), norm.centred, spans_heads, norm.bias)

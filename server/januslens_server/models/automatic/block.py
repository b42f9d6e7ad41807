"""Finding attention and MLP in a block by the tensors that its modules passed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from januslens_server.capture import End, Rotation, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.graph.weights import Finish
from januslens_server.models.automatic.norms import epsilon, read_norm
from januslens_server.models.automatic.probe import Event, Probe, same_memory
from januslens_server.models.views import Attention, Block, Linear, Mlp, is_norm


@dataclass(frozen=True)
class Settings:
    """What a block's tensors do not show and the model's configuration says."""

    n_heads: int
    n_kv_heads: int
    soft_cap: float | None
    residual_multiplier: float


class BlockFinder:
    """Reads one block off the calls that a probe saw of its modules."""

    def __init__(self, name: str, module: nn.Module, probe: Probe) -> None:
        """`name` is the block's in the model."""
        self._name = name
        self._module = module
        self._events = probe.inside(name)
        block = probe.of(module)
        if block is None:
            raise ModelFailed(f"expected {name} to be called, it was not")
        self._input = block.input
        linears = [e for e in self._events if isinstance(e.module, nn.Linear | Conv1D)]
        self._attention, self._mlp = self._split(linears)

    def block(
        self,
        settings: Settings,
        rotation: Callable[[int], Rotation] | None,
        window: int | None,
    ) -> Block:
        """The block under the field's names, with one reading of what its tensors don't show."""
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
        """The width of all heads' queries together."""
        return self._attention[0].output.shape[-1]

    def _split(self, linears: Sequence[Event]) -> tuple[list[Event], list[Event]]:
        """Query, key, value and output; then gate, up and down, or the MLP's two maps."""
        if len(linears) not in {6, 7}:
            raise ModelFailed(
                f"expected {self._name} to have 6 or 7 linear maps (query, key, value, output, "
                f"and an MLP's 2 or 3), got {len(linears)}: {[e.name for e in linears]}"
            )
        attention, mlp = list(linears[:4]), list(linears[4:])
        if not all(same_memory(e.input, attention[0].input) for e in attention[1:3]):
            raise ModelFailed(f"expected query, key and value of {self._name} to share an input")
        return attention, mlp

    def _read_attention(
        self,
        settings: Settings,
        rotation: Callable[[int], Rotation] | None,
        window: int | None,
        output: Event,
    ) -> Attention:
        query, key, value, _ = (_linear(event.module) for event in self._attention)
        d_head = self._attention[0].output.shape[-1] // settings.n_heads
        owner = self._owner(self._attention[0])
        finish, added = self._finish(settings, output)
        return Attention(
            query=query,
            key=key,
            value=value,
            output=_linear(output.module),
            n_heads=settings.n_heads,
            n_kv_heads=settings.n_kv_heads,
            scoring=Scoring(
                scale=getattr(owner, "scaling", None) or d_head**-0.5,
                soft_cap=settings.soft_cap,
                sinks=getattr(owner, "sinks", None),
                window=window,
            ),
            rotation=rotation,
            query_map=self._head_map(self._attention[0], d_head),
            key_map=self._head_map(self._attention[1], d_head),
            finish=finish,
            added=added,
        )

    def _read_mlp(self, settings: Settings, second: Event) -> Mlp:
        finish, added = self._finish(settings, second)
        ff2 = _linear(second.module)
        if len(self._mlp) == 2:
            return Mlp(_linear(self._mlp[0].module), ff2, finish=finish, added=added)
        gate, up = self._gate_and_up()
        return Mlp(_linear(gate.module), ff2, up=_linear(up.module), finish=finish, added=added)

    def _gate_and_up(self) -> tuple[Event, Event]:
        """The gate is the one of the two whose result an activation module takes."""
        one, other, _ = self._mlp
        for event in self._events:
            if isinstance(event.module, nn.Linear | Conv1D) or is_norm(event.module):
                continue
            if not list(event.module.children()):
                if same_memory(event.input, one.output):
                    return one, other
                if same_memory(event.input, other.output):
                    return other, one
        raise ModelFailed(f"expected an activation after one of {one.name}, {other.name}")

    def _head_map(self, event: Event, d_head: int) -> HeadMap:
        """A norm that takes a query's or key's linear result, if there is one."""
        for norm in self._norms():
            if same_memory(norm.input, event.output):
                spans = norm.module.get_parameter("weight").numel() != d_head
                return HeadMap(norm=_head_norm(norm, d_head, spans_heads=spans))
        return HeadMap()

    def _finish(self, settings: Settings, result: Event) -> tuple[Finish | None, Tap | None]:
        """A norm that takes a sublayer's raw result, or the model's residual multiplier."""
        for norm in self._norms():
            if same_memory(norm.input, result.output) and norm.input.shape == result.output.shape:
                return Finish(norm=read_norm(norm)), Tap(norm.module, End.OUTPUT)
        if settings.residual_multiplier != 1.0:
            return Finish(multiplier=settings.residual_multiplier), None
        return None, None

    def _middle(self, mlp_norm: Event | None, first: Event) -> Tap:
        if mlp_norm is not None:
            return Tap(mlp_norm.module, End.INPUT)
        return Tap(first.module, End.INPUT)

    def _norm_giving(self, tensor: torch.Tensor) -> Event | None:
        return next((e for e in self._norms() if same_memory(e.output, tensor)), None)

    def _norms(self) -> list[Event]:
        return [event for event in self._events if is_norm(event.module)]

    def _owner(self, event: Event) -> Any:
        """The module that holds a linear map: the attention."""
        local = event.name.removeprefix(f"{self._name}.").rpartition(".")[0]
        return self._module.get_submodule(local)


def _linear(module: nn.Module) -> Linear:
    return Linear(module, stored_as_rows=isinstance(module, Conv1D))


def _head_norm(event: Event, d_head: int, *, spans_heads: bool) -> HeadNorm:
    """The numbers of a query's or key's norm."""
    norm = read_norm(event)
    if spans_heads and (norm.centred or norm.bias is not None):
        raise ModelFailed(f"expected {event.name}, a norm over all heads, to be an RMSNorm")
    weight = norm.weight.unflatten(0, (-1, d_head)) if spans_heads else norm.weight
    return HeadNorm(weight, epsilon(event.module), norm.centred, spans_heads, norm.bias)

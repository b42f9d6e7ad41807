"""Find the attention of a block in an observed pass: its linear maps, norms and gate.

Some details are not visible in the tensors that modules exchange, such as the order of queries,
keys and values in a fused map. They have few candidates, which `layouts` lists; the one that
reproduces the model's attention is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from januslens_server.capture import End, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.weights import HeadMap, HeadNorm
from januslens_server.models.adapters.modules import by_head, consecutive
from januslens_server.models.adapters.observed_mlp import linear
from januslens_server.models.adapters.observed_pass import (
    ModuleCall,
    epsilon,
    is_norm,
    read_norm,
    same_memory,
)
from januslens_server.models.matrices import Linear
from januslens_server.models.views import AttentionGate, LatentAttention

# Shards in which CodeGen stores its fused map.
SHARDS = 4

# Functions that models apply to what the linear map of a gate returns.
GATES = (torch.sigmoid, functional.softplus)


@dataclass(frozen=True)
class Layout:
    """A candidate for the parts of attention's linear maps."""

    query: Linear
    key: Linear
    value: Linear
    n_kv_heads: int
    gate: AttentionGate | None = None
    latent: LatentAttention | None = None


@dataclass(frozen=True)
class QueryKeyNorms:
    """Norms of queries and keys: before the rotation as maps with their taps, or after it.

    `value_norm` is the tap of a norm of values.
    """

    query_map: HeadMap
    key_map: HeadMap
    query_norm: Tap | None = None
    key_norm: Tap | None = None
    rotated_query: HeadNorm | None = None
    rotated_key: HeadNorm | None = None
    value_norm: Tap | None = None


class AttentionFinder:
    """Map one block's attention from the calls of its modules in an observed pass.

    `maps` are its linear maps, the output last; `calls` are all of the block. A fused map stands
    for query, key and value; a fourth map before the output is a gate of the heads' results.
    """

    def __init__(
        self, block: str, owner: nn.Module, maps: Sequence[ModuleCall], calls: Sequence[ModuleCall]
    ) -> None:
        """Check what the maps read.

        Raises `ModelFailed` unless query, key and value have one input, or latent vectors do.
        """
        self.owner: Any = owner
        self.input = maps[0].input
        self.result = maps[-1]
        self.output = linear(maps[-1])
        self._maps = list(maps[:-1])
        self._calls = calls
        self.latent = _reads(self._maps, self.input) in ((True, True, False), _QUERY_LATENT)
        if not self.latent and not all(_reads(self._maps, self.input)):
            raise ModelFailed(f"query, key and value of {block} have different inputs")

    def d_head(self, n_heads: int) -> int:
        """Return the width of a head's result, which is that of its values."""
        return self.result.input.shape[-1] // n_heads

    def layouts(self, n_heads: int) -> list[Layout]:
        """List the candidates for query, key, value and gate.

        Raises `ModelFailed` if the maps' widths fit none.
        """
        found = list(self._layouts(n_heads, self.d_head(n_heads)))
        if not found:
            widths = ", ".join(f"{call.name}: {call.output.shape[-1]}" for call in self._maps)
            raise ModelFailed(
                f"maps of widths {widths} are no queries, keys and values of {n_heads} heads"
            )
        return found

    def _layouts(self, n_heads: int, d_head: int) -> Iterator[Layout]:
        whole = n_heads * d_head
        if self.latent:
            yield from self._behind_latent(n_heads, d_head)
            return
        if len(self._maps) == 1:
            yield from _fused(self._maps[0], n_heads, d_head)
            return
        query, key, value, *rest = (
            self._maps if len(self._maps) > 2 else [*self._maps, self._maps[1]]
        )
        n_kv_heads, left = divmod(value.output.shape[-1], d_head)
        if left or n_kv_heads < 1 or n_heads % n_kv_heads:
            return  # such as the maps of linear attention
        d_query = query.output.shape[-1] // n_heads  # values may have another width
        d_key = key.output.shape[-1] // n_kv_heads
        plain = Layout(linear(query), linear(key), linear(value), n_kv_heads)
        if not rest and d_key == d_query:
            yield plain
        elif not rest and query.output.shape[-1] == 2 * whole and d_key == d_head:
            for columns, gate in _halves(n_heads, d_head):
                for function in GATES:
                    yield replace(
                        plain,
                        query=linear(query, columns),
                        gate=AttentionGate(linear(query, gate), function),
                    )
        elif rest and rest[0].output.shape[-1] in {n_heads, whole} and d_key == d_query:
            for function in GATES:
                yield replace(plain, gate=AttentionGate(linear(rest[0]), function))

    def _behind_latent(self, n_heads: int, d_value: int) -> Iterator[Layout]:
        """Yield the layout of DeepSeek, if it fits.

        The second map of keys and values holds both head by head. The first one's last dimensions
        are the rotated part of the keys.
        """
        *queries, key_down, key_up = self._maps
        rank, d_query = key_up.input.shape[-1], queries[-1].output.shape[-1] // n_heads
        rotary = key_down.output.shape[-1] - rank
        d_key = d_query - rotary
        if key_up.output.shape[-1] != n_heads * (d_key + d_value) or min(rotary, d_key) < 1:
            return
        columns = torch.arange(key_up.output.shape[-1]).reshape(n_heads, -1)
        keys, values = (
            tuple(part.flatten().tolist()) for part in columns.split([d_key, d_value], dim=1)
        )
        yield Layout(
            linear(queries[-1]),
            linear(key_up, keys),
            linear(key_up, values),
            n_heads,
            latent=LatentAttention(
                key_down=linear(key_down, range(rank)),
                rotated_key=linear(key_down, range(rank, rank + rotary)),
                key_norm=self._latent_norm(key_up),
                query_down=linear(queries[0]) if len(queries) == 2 else None,
                query_norm=self._latent_norm(queries[1]) if len(queries) == 2 else None,
            ),
        )

    def _latent_norm(self, reader: ModuleCall) -> HeadNorm:
        """Map the norm whose result a map reads; it must be an RMSNorm without a bias."""
        for call in self._calls:
            if is_norm(call.module) and same_memory(call.output, reader.input):
                norm = read_norm(call)
                if norm.centred or norm.bias is not None:
                    raise ModelFailed(f"{call.name} is no RMSNorm of latent vectors")
                return HeadNorm(norm.weight, norm.eps)
        raise ModelFailed(f"{reader.name} does not read what a norm returns")

    def value_map(self) -> HeadMap:
        """Map what multiplies values: a number in MiMo V2."""
        return HeadMap(multiplier=float(getattr(self.owner, "v_scale", 1.0)))

    def norms(self, d_head: int) -> QueryKeyNorms:
        """Map the norms of queries and keys.

        Norms that do not read what a linear map returned must be RMSNorms without a bias; they are
        those after the rotation. Falcon-H1 multiplies keys by a number.
        """
        multiplier = float(getattr(self.owner, "key_multiplier", 1.0))
        found = self._norms(d_head)
        return replace(found, key_map=replace(found.key_map, multiplier=multiplier))

    def _norms(self, d_head: int) -> QueryKeyNorms:
        if self.latent:
            return QueryKeyNorms(HeadMap(), HeadMap())
        inside = [call for call in self._calls if is_norm(call.module) and self._owns(call.module)]
        query, key = self._maps[0], self._maps[min(1, len(self._maps) - 1)]
        of_query = [call for call in inside if same_memory(call.input, query.output)]
        of_key = [call for call in inside if same_memory(call.input, key.output)]
        if query is key:
            of_query, of_key = of_query[:1], of_query[1:2]
        of_value = of_key[1:]  # keys and values of one map
        if len(self._maps) > 2:
            value = self._maps[2]
            of_value = [call for call in inside if same_memory(call.input, value.output)]
        found = QueryKeyNorms(
            _head_map(of_query, d_head),
            _head_map(of_key, d_head),
            _norm_tap(of_query),
            _norm_tap(of_key),
            value_norm=_norm_tap(of_value),
        )
        if of_query or of_key or len(inside) != 2:
            return found
        after = [_head_norm(call, d_head) for call in inside]
        if any(norm.centred or norm.bias is not None or norm.spans_heads for norm in after):
            raise ModelFailed(f"{inside[0].name} is no RMSNorm over a head's rotated queries")
        return replace(found, rotated_query=after[0], rotated_key=after[1])

    def _owns(self, module: nn.Module) -> bool:
        return any(module is own for own in self.owner.modules())


# Which maps read the block's vector in attention with latent queries: the first maps of queries and
# of keys and values do, the second ones do not.
_QUERY_LATENT = (True, False, True, False)


def _reads(maps: Sequence[ModuleCall], tensor: torch.Tensor) -> tuple[bool, ...]:
    return tuple(same_memory(call.input, tensor) for call in maps)


def _fused(call: ModuleCall, n_heads: int, d_head: int) -> Iterator[Layout]:
    """Yield the ways in which one map may hold queries, keys and values."""
    whole = n_heads * d_head
    n_kv_heads, rest = divmod(call.output.shape[-1] - whole, 2 * d_head)
    if rest or n_kv_heads < 1 or n_heads % n_kv_heads:
        return
    own, module = linear(call), call.module

    def split(parts: Sequence[Linear]) -> Layout:
        query, key, value = (replace(own, columns=part.columns) for part in parts)
        return Layout(query, key, value, n_kv_heads)

    yield split(consecutive(module, whole, n_kv_heads * d_head, n_kv_heads * d_head))
    yield split(by_head(module, n_heads, d_head, n_heads // n_kv_heads))
    if n_kv_heads == n_heads and n_heads % SHARDS == 0:
        query, value, key = by_head(module, SHARDS, whole // SHARDS)
        yield split([query, key, value])


def _halves(n_heads: int, d_head: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield columns of queries and of their gate: head by head, or all queries first."""
    both = torch.arange(2 * n_heads * d_head)
    for shape in ((n_heads, 2, d_head), (1, 2, n_heads * d_head)):
        queries, gates = both.reshape(shape).transpose(0, 1).flatten(1).tolist()
        yield tuple(queries), tuple(gates)


def _head_map(norms: Sequence[ModuleCall], d_head: int) -> HeadMap:
    return HeadMap(norm=_head_norm(norms[0], d_head)) if norms else HeadMap()


def _norm_tap(norms: Sequence[ModuleCall]) -> Tap | None:
    """Return the tap of a norm's output. Strides show if heads come before positions."""
    if not norms:
        return None
    given = norms[0].input
    heads_first = given.dim() == 4 and given.stride(1) < given.stride(2)
    return Tap(norms[0].module, End.OUTPUT, heads_first=heads_first)


def _head_norm(call: ModuleCall, d_head: int) -> HeadNorm:
    """Map a norm of queries or keys; one with more weights than a head's width spans heads."""
    norm = read_norm(call)
    spans_heads = norm.weight.numel() != d_head
    if spans_heads and (norm.centred or norm.bias is not None):
        raise ModelFailed(f"{call.name} is not an RMSNorm: expected one for a norm over all heads")
    weight = norm.weight.unflatten(0, (-1, d_head)) if spans_heads else norm.weight
    return HeadNorm(weight, epsilon(call.module), norm.centred, spans_heads, norm.bias)

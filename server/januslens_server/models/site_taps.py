"""The taps of the sites of a block.

A site's value may differ from the tensor that a module takes or returns: queries are clipped after
their linear map, and some models multiply a sublayer's result. `SiteTap` covers both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from januslens_server.capture import End, Tap
from januslens_server.graph.weights import Finish
from januslens_server.models.experts import Experts
from januslens_server.models.matrices import Linear
from januslens_server.models.views import Attention, Block, CoarseBlock, Mlp
from januslens_server.results import NodeKind
from januslens_server.specs import Site


@dataclass(frozen=True)
class SiteTap:
    """The tensor of a site in one layer.

    `shape` is that of one position. The value is the tapped tensor, clipped to `[-clip, clip]` and
    times `multiplier`.
    """

    tap: Tap
    shape: tuple[int, ...]
    clip: float | None = None
    multiplier: float = 1.0

    def values(self, tapped: torch.Tensor) -> torch.Tensor:
        """Return the values `[pos, *shape]`, given the tapped tensor with or without batch axis."""
        values = tapped.reshape(-1, *self.shape)
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        return values if self.multiplier == 1.0 else values * self.multiplier

    def replaced(self, tapped: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return the tapped tensor that has the `new` values, shaped as `tapped`.

        Where a value stays the same, the tapped tensor does so bit for bit.
        """
        if self.clip is None and self.multiplier == 1.0:
            return new.reshape(tapped.shape)
        raw = tapped.reshape(new.shape)
        return torch.where(new == self.values(tapped), raw, new / self.multiplier).reshape(
            tapped.shape
        )


def block_taps(block: Block | CoarseBlock, width: int) -> dict[Site, SiteTap]:
    """Return the taps of the sites of a block whose values a single tensor has.

    `width` is that of the residual stream.
    """
    residual = (width,)
    output = {Site.BLOCK_OUTPUT: SiteTap(Tap(block.module, End.OUTPUT), residual)}
    if isinstance(block, CoarseBlock):
        return _sublayer_taps(block, residual) | output
    taps = output
    if block.attention is not None:
        taps |= _attention_taps(block.attention, residual)
    if block.residual_mid is not None:
        taps[Site.RESIDUAL_MID] = SiteTap(block.residual_mid, residual)
    if len(block.beside) == 1:
        other = block.beside[0]
        taps[Site.MIXER_OUTPUT] = SiteTap(other.output, residual, multiplier=other.multiplier)
    if isinstance(block.mlp, Mlp):
        taps |= _mlp_taps(block.mlp, residual)
    elif block.mlp is not None:
        taps |= _expert_taps(block.mlp, residual)
    return taps


def _attention_taps(attention: Attention, residual: tuple[int, ...]) -> dict[Site, SiteTap]:
    taps = {
        Site.ATTENTION_INPUT: SiteTap(attention.input, residual),
        Site.VALUE: SiteTap(
            attention.value_norm or attention.value.output,
            _heads(attention, attention.value),
            attention.value_map.clip,
            attention.value_map.multiplier,
        ),
        Site.HEAD_RESULT: SiteTap(
            attention.output.input, (attention.n_heads, attention.output.d_in // attention.n_heads)
        ),
        Site.ATTENTION_OUTPUT: _added(
            attention.output.output, attention.finish, attention.added, residual
        ),
    }
    if attention.latent is None:  # else no tensor has whole keys, and heads are wider than values
        taps[Site.QUERY] = _query_or_key(attention, attention.query)
        taps[Site.KEY] = _query_or_key(attention, attention.key)
    return taps


def _sublayer_taps(block: CoarseBlock, residual: tuple[int, ...]) -> dict[Site, SiteTap]:
    """Return the taps of what sublayers add; several of one kind have no common tensor."""
    taps: dict[Site, SiteTap] = {}
    for site in (Site.ATTENTION_OUTPUT, Site.MIXER_OUTPUT, Site.MLP_OUTPUT):
        adding = block.adding(NodeKind[site.name])
        if len(adding) == 1:
            taps[site] = SiteTap(adding[0].output, residual, multiplier=adding[0].multiplier)
    if block.residual_mid is not None:
        taps[Site.RESIDUAL_MID] = SiteTap(block.residual_mid, residual)
    return taps


def _mlp_taps(mlp: Mlp, residual: tuple[int, ...]) -> dict[Site, SiteTap]:
    return {
        Site.MLP_INPUT: SiteTap(mlp.ff1.input, residual),
        Site.NEURONS: SiteTap(mlp.ff2.input, (mlp.ff2.d_in,)),
        Site.MLP_OUTPUT: _added(mlp.ff2.output, mlp.finish, mlp.added, residual),
    }


def _expert_taps(mlp: Experts, residual: tuple[int, ...]) -> dict[Site, SiteTap]:
    taps = {Site.MLP_INPUT: SiteTap(mlp.input, residual)}
    if mlp.beside is None:  # else no tensor has the whole result
        taps[Site.MLP_OUTPUT] = _added(mlp.output, mlp.finish, mlp.added, residual)
    if mlp.router is not None:
        taps[Site.ROUTER] = SiteTap(Tap(mlp.router, End.OUTPUT), (mlp.count,))
    return taps


def _query_or_key(attention: Attention, linear: Linear) -> SiteTap:
    """Return the tap of queries or keys: their norm's output, or that of their linear map."""
    is_query = linear is attention.query
    norm = attention.query_norm if is_query else attention.key_norm
    mapped = attention.query_map if is_query else attention.key_map
    clip = mapped.clip if norm is None else mapped.clip_after
    return SiteTap(norm or linear.output, _heads(attention, linear), clip, mapped.multiplier)


def _heads(attention: Attention, linear: Linear) -> tuple[int, int]:
    """Return the number of heads and their width for a linear map of attention."""
    heads = attention.n_heads if linear is attention.query else attention.n_kv_heads
    return heads, linear.d_out // heads


def _added(
    raw: Tap, finish: Finish | None, added: Tap | None, residual: tuple[int, ...]
) -> SiteTap:
    """Return the tap of what a sublayer adds to the residual stream."""
    multiplier = 1.0 if finish is None or added is not None else finish.multiplier
    return SiteTap(added or raw, residual, multiplier=multiplier)

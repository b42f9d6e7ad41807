"""Sites: where a layer holds the tensors that can be read, and how they are shaped.

A site's value may differ from the tensor that a module takes or returns: queries are clipped after
their linear map, and some models multiply a sublayer's result. `SiteTap` covers both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from januslens_server.capture import End, Tap
from januslens_server.graph.weights import Finish
from januslens_server.models.experts import Experts
from januslens_server.models.matrices import Linear
from januslens_server.models.resident import ResidentModel
from januslens_server.models.views import Attention, Block, CoarseBlock, Mlp
from januslens_server.specs import Site

# A site in a layer; the layer of EMBEDDING is -1, that of FINAL_NORM and LOGITS `n_layers`.
SiteKey = tuple[int, Site]

BEFORE_LAYERS = (Site.EMBEDDING,)
AFTER_LAYERS = (Site.FINAL_NORM, Site.LOGITS)
READ_ONLY = (Site.ATTENTION_INPUT, Site.MLP_INPUT, *AFTER_LAYERS)
SITES_WITH_HEADS = (
    Site.QUERY,
    Site.KEY,
    Site.VALUE,
    Site.ATTENTION_PATTERN,
    Site.HEAD_RESULT,
)


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


def site_shape(model: ResidentModel, key: SiteKey, length: int) -> tuple[int, ...]:
    """Return the shape of a site at one position of a prompt of `length` tokens.

    Raises `KeyError` if the layer has no such site.
    """
    layer, site = key
    if site is Site.ATTENTION_PATTERN:
        return model.view.parts(layer).attention.n_heads, length
    if site is Site.LOGITS:
        return (model.view.facts.vocab_size,)
    experts = site_experts(model, key)
    return site_tap(model, key).shape if experts is None else (experts.count, experts.width)


def site_experts(model: ResidentModel, key: SiteKey) -> Experts | None:
    """Return the experts whose neurons a site has; None for all other sites."""
    layer, site = key
    if site is not Site.NEURONS:
        return None
    mlp = model.view.parts(layer).mlp
    return mlp if isinstance(mlp, Experts) else None


def site_tap(model: ResidentModel, key: SiteKey) -> SiteTap:
    """Return the tap of a site; raises `KeyError` if no single tensor of the model has its values.

    ATTENTION_PATTERN is computed from QUERY and KEY, NEURONS of experts are computed again, and
    LOGITS are the result of the pass.
    """
    layer, site = key
    view = model.view
    residual = (view.facts.d_model,)
    if site is Site.EMBEDDING:
        return SiteTap(Tap(view.blocks[0].module, End.INPUT), residual)
    if site is Site.FINAL_NORM:
        head = Tap(model.network.get_output_embeddings(), End.INPUT)
        return SiteTap(view.normed or head, residual)
    return _block_taps(view.blocks[layer], view.facts.d_model)[site]


def sites_of_layer(model: ResidentModel, layer: int) -> tuple[Site, ...]:
    """Return the sites that a layer has, in the order of the pass."""
    block = model.view.blocks[layer]
    taps = _block_taps(block, model.view.facts.d_model)
    computed = {Site.ATTENTION_PATTERN} if Site.KEY in taps else set()
    if isinstance(block, Block) and isinstance(block.mlp, Experts):
        computed.add(Site.NEURONS)
    return tuple(sorted({*taps, *computed}))


def site_keys(model: ResidentModel, site: Site, layers: Sequence[int]) -> list[SiteKey]:
    """Return the keys of a site in those of the `layers` that have it."""
    if site in BEFORE_LAYERS:
        return [(-1, site)]
    if site in AFTER_LAYERS:
        return [(model.view.facts.n_layers, site)]
    return [(layer, site) for layer in layers if site in sites_of_layer(model, layer)]


def _block_taps(block: Block | CoarseBlock, d_model: int) -> dict[Site, SiteTap]:
    residual = (d_model,)
    output = {Site.BLOCK_OUTPUT: SiteTap(Tap(block.module, End.OUTPUT), residual)}
    if isinstance(block, CoarseBlock):
        return output
    attention, mlp = block.attention, block.mlp
    taps = {
        Site.ATTENTION_INPUT: SiteTap(attention.input, residual),
        Site.VALUE: SiteTap(
            attention.value.output, _heads(attention, attention.value), attention.value_clip
        ),
        Site.HEAD_RESULT: SiteTap(attention.output.input, _heads(attention, attention.query)),
        Site.ATTENTION_OUTPUT: _added(
            attention.output.output, attention.finish, attention.added, residual
        ),
    } | output
    if attention.latent is None:  # else no tensor has whole keys, and heads are wider than values
        taps[Site.QUERY] = _query_or_key(attention, attention.query)
        taps[Site.KEY] = _query_or_key(attention, attention.key)
    if block.residual_mid is not None:
        taps[Site.RESIDUAL_MID] = SiteTap(block.residual_mid, residual)
    return taps | (
        _mlp_taps(mlp, residual) if isinstance(mlp, Mlp) else _expert_taps(mlp, residual)
    )


def _mlp_taps(mlp: Mlp, residual: tuple[int, ...]) -> dict[Site, SiteTap]:
    return {
        Site.MLP_INPUT: SiteTap(mlp.ff1.input, residual),
        Site.NEURONS: SiteTap(mlp.ff2.input, (mlp.ff2.d_in,)),
        Site.MLP_OUTPUT: _added(mlp.ff2.output, mlp.finish, mlp.added, residual),
    }


def _expert_taps(mlp: Experts, residual: tuple[int, ...]) -> dict[Site, SiteTap]:
    taps = {
        Site.MLP_INPUT: SiteTap(mlp.input, residual),
        Site.MLP_OUTPUT: _added(mlp.output, mlp.finish, mlp.added, residual),
    }
    if mlp.router is not None:
        taps[Site.ROUTER] = SiteTap(Tap(mlp.router, End.OUTPUT), (mlp.count,))
    return taps


def _query_or_key(attention: Attention, linear: Linear) -> SiteTap:
    """Return the tap of queries or keys: their norm's output, or that of their linear map."""
    is_query = linear is attention.query
    norm = attention.query_norm if is_query else attention.key_norm
    mapped = attention.query_map if is_query else attention.key_map
    clip = mapped.clip if norm is None else mapped.clip_after
    return SiteTap(norm or linear.output, _heads(attention, linear), clip)


def _heads(attention: Attention, linear: Linear) -> tuple[int, int]:
    """Return the number of heads and their width for a linear map of attention."""
    width = attention.output.d_in // attention.n_heads
    heads = attention.n_heads if linear is attention.query else attention.n_kv_heads
    return heads, width


def _added(
    raw: Tap, finish: Finish | None, added: Tap | None, residual: tuple[int, ...]
) -> SiteTap:
    """Return the tap of what a sublayer adds to the residual stream."""
    multiplier = 1.0 if finish is None or added is not None else finish.multiplier
    return SiteTap(added or raw, residual, multiplier=multiplier)

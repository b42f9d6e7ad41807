"""Sites: where a layer holds the tensors that can be read, and how they are shaped."""

from __future__ import annotations

from collections.abc import Sequence

from januslens_server.capture import End, Tap
from januslens_server.models.experts import Experts
from januslens_server.models.resident import ResidentModel
from januslens_server.models.site_taps import SiteTap
from januslens_server.models.views import Block
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


def site_shape(model: ResidentModel, key: SiteKey, length: int) -> tuple[int, ...]:
    """Return the shape of a site at one position of a prompt of `length` tokens.

    Raises `KeyError` if the layer has no such site.
    """
    layer, site = key
    if site is Site.ATTENTION_PATTERN:
        return model.view.attention(layer).n_heads, length
    if site is Site.LOGITS:
        return (model.view.facts.vocab_size,)
    experts = site_experts(model, key)
    return site_tap(model, key).shape if experts is None else (experts.count, experts.width)


def site_experts(model: ResidentModel, key: SiteKey) -> Experts | None:
    """Return the experts whose neurons a site has; None for all other sites."""
    layer, site = key
    if site is not Site.NEURONS:
        return None
    mlp = model.view.mlp(layer)
    return mlp if isinstance(mlp, Experts) else None


def site_tap(model: ResidentModel, key: SiteKey) -> SiteTap:
    """Return the tap of a site; raises `KeyError` if no single tensor of the model has its values.

    ATTENTION_PATTERN is computed from QUERY and KEY, NEURONS of experts are computed again, and
    LOGITS are the result of the pass.
    """
    layer, site = key
    view = model.view
    if site is Site.EMBEDDING:
        residual = (view.facts.stream_width,)
        return SiteTap(Tap(view.blocks[0].module, End.INPUT), residual)
    if site is Site.FINAL_NORM:
        head = Tap(model.network.get_output_embeddings(), End.INPUT)
        return SiteTap(view.normed or head, (view.facts.d_model,))
    return model.site_taps[layer][site]


def sites_of_layer(model: ResidentModel, layer: int) -> tuple[Site, ...]:
    """Return the sites that a layer has, in the order of the pass."""
    block = model.view.blocks[layer]
    taps = model.site_taps[layer]
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

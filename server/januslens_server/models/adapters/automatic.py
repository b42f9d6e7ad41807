"""Map a decoder without an adapter by its structure, observed in one forward pass.

Details that no tensor shows, such as the window or the pairing of rotary dimensions, have few
candidates. The candidate whose recomputed attention equals the model's is used. Of a block whose
parts are unknown, the residual stream is shown.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture import Rotation
from januslens_server.errors import ModelFailed
from januslens_server.graph.weights import QueryScaling
from januslens_server.models.adapters.modules import run_eagerly, table_rotation
from januslens_server.models.adapters.observed_block import BlockFinder, BlockSettings
from januslens_server.models.adapters.observed_pass import observe
from januslens_server.models.adapters.several_streams import MIXING
from januslens_server.models.adapters.stream import (
    Stream,
    find_stream,
    reason_of,
    view_of_stream,
)
from januslens_server.models.experts import Experts
from januslens_server.models.lengths import (
    TOLERANCE,
    Length,
    attention_error,
    captured_layers,
    lengths_of,
    miniature,
    prompt_of,
)
from januslens_server.models.views import Attention, Block, ModelView

# Maximum relative error of the heads' results in the model's data type: the right candidate differs
# by rounding, a wrong one by tens of per cent.
COARSE = 5e-2

# The number of `pairings`.
PAIRINGS = 4

# The field of configurations with the length of the chunks into which Llama 4 cuts a prompt.
CHUNK = "attention_chunk_size"

# Errors for configurations and modules of another kind.
UNKNOWN = (
    AttributeError,
    LookupError,
    ModelFailed,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

# A function from length to rotation; None if queries and keys are not rotated.
RotationOfLength = Callable[[int], Rotation] | None


@dataclass(frozen=True)
class AttentionVariant:
    """A candidate for how a layer's attention works.

    `window` is the field with the length of the window or chunk, or None. `rotation` is an index
    into the layer's `rotations`, `layout` one into the candidates for its linear maps. `capped` and
    `scaled` say whether the layer uses the configuration's soft-cap of scores and its scaling of
    queries by position.
    """

    window: Length | None
    rotation: int
    layout: int = 0
    capped: bool = False
    scaled: bool = False


def view(model: PreTrainedModel) -> ModelView:
    """Map a decoder-only model that has no adapter, each block as far as its structure is known.

    A block whose parts are known has three linear maps with one input (query, key, value), one
    output map, and two or three maps of an MLP or a mixture of experts. Norms are recognised by
    their results. A layer's window and rotation are those that reproduce the model's attention; if
    the configuration names lengths, at every position of a miniature with short lengths. Of all
    other blocks, the residual stream is shown.

    Raises:
        ModelFailed: The model has no residual stream.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        run_eagerly(model)
    stream = find_stream(model)
    if stream.count > 1:
        return view_of_stream(stream, [MIXING.format(stream.count)])
    try:
        blocks, facts = _parts(stream)
    except UNKNOWN as error:
        return view_of_stream(stream, [reason_of(error, model.config)])
    coarse = view_of_stream(stream, ["" if isinstance(b, Block) else b for b in blocks])
    return replace(
        coarse,
        blocks=tuple(
            block if isinstance(block, Block) else other
            for block, other in zip(blocks, coarse.blocks, strict=True)
        ),
        facts=replace(
            coarse.facts,
            n_heads=facts.n_heads,
            n_kv_heads=facts.n_kv_heads,
            d_head=facts.d_head,
            d_mlp=facts.d_mlp,
            n_experts=facts.n_experts,
        ),
    )


def _parts(stream: Stream) -> tuple[list[Block | str], _PartSizes]:
    """Return each block, or why its parts are unknown, and the sizes of those parts.

    Raises `ModelFailed` if the parts of no block are known.
    """
    structure = Structure(stream)
    lengths = lengths_of(stream.model.config)
    attention = structure.first_attention if lengths else None
    if attention is not None:
        variants = _variants_beyond(stream.model, attention, lengths)
    else:
        variants = structure.variants(stream.ids, [], COARSE, best=True)
    return structure.blocks(variants)


def _variants_beyond(
    model: PreTrainedModel, attention: Attention, lengths: list[Length]
) -> list[AttentionVariant | str]:
    """Find the variants that reproduce attention at every position of a miniature."""
    d_head = attention.query.d_out // attention.n_heads
    small = miniature(model, attention.n_heads, attention.n_kv_heads, d_head, lengths)
    ids = prompt_of(small)
    return Structure(find_stream(small)).variants(
        ids, lengths_of(small.config), TOLERANCE, best=False
    )


class _PartSizes(NamedTuple):
    """Sizes of the parts of blocks, 0 where no block shows them."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    n_experts: int


class Structure:
    """A decoder's structure from an observed pass: everything that does not depend on a variant."""

    def __init__(self, stream: Stream) -> None:
        """Observe a forward pass and find the parts of the blocks.

        Raises `ModelFailed` if no block has known linear maps.
        """
        self._model = stream.model
        self._config: Any = stream.model.config.get_text_config()
        self.settings = _settings(self._config)
        self._modules = list(stream.blocks)
        observed = observe(stream.model)
        self._finders: list[BlockFinder | str] = []
        for i, module in enumerate(self._modules):
            try:
                self._finders.append(
                    BlockFinder(f"{stream.name}.{i}", module, observed, self._config)
                )
            except UNKNOWN as error:
                self._finders.append(reason_of(error, self._config))
        reasons = [found for found in self._finders if isinstance(found, str)]
        if len(reasons) == len(self._finders):
            raise ModelFailed(reasons[0])

    @property
    def first_attention(self) -> Attention | None:
        """The attention of the first block with a known one, without a window or a rotation."""
        for layer in range(len(self._modules)):
            try:
                found = self._block(layer, AttentionVariant(None, 0)).attention
            except UNKNOWN:  # its reason is that of the layer
                continue
            if found is not None:
                return found
        return None

    def _finder(self, layer: int) -> BlockFinder:
        found = self._finders[layer]
        if isinstance(found, str):
            raise ModelFailed(found)
        return found

    def variants(
        self, ids: torch.Tensor, lengths: list[Length], tolerance: float, *, best: bool
    ) -> list[AttentionVariant | str]:
        """Find the variant of each layer that reproduces the captured attention.

        With `best`, the one with the smallest error at the last position of `ids` `[1, pos]`, else
        the first within `tolerance` at every position. A layer without known parts, or without a
        variant within the tolerance, has the reason instead.
        """
        last = ids.shape[1] - 1
        positions = [last] if best else list(range(last, -1, -1))
        found: list[AttentionVariant | str] = []
        plain: dict[tuple[int, int], Block] = {}
        for layer in range(len(self._modules)):
            try:
                layouts = self._finder(layer).layouts(self.settings)
                for layout in range(layouts):
                    variant = AttentionVariant(None, 0, layout)
                    plain[layer, layout] = self._block(layer, variant)
                found.append("" if layouts else AttentionVariant(None, 0))
            except UNKNOWN as error:
                found.append(reason_of(error, self._config))
        blocks = captured_layers(self._model, ids, plain.values())
        captured = dict(zip(plain, blocks, strict=True))
        for layer in {layer for layer, _ in plain if not found[layer]}:
            try:
                found[layer] = self._variant(layer, captured, lengths, positions, tolerance, best)
            except UNKNOWN as error:
                found[layer] = reason_of(error, self._config)
        return found

    def _variant(
        self,
        layer: int,
        captured: dict[tuple[int, int], dict[str, torch.Tensor]],
        lengths: list[Length],
        positions: list[int],
        tolerance: float,
        best: bool,
    ) -> AttentionVariant | str:
        errors: dict[AttentionVariant, float] = {}
        for variant in self._candidates(layer, lengths):
            block = self._block(layer, variant)
            if block.attention is None or _is_too_wide(block.attention):
                continue
            tensors = captured[layer, variant.layout]
            errors[variant] = attention_error(block, tensors, positions, tolerance)
            if not best and errors[variant] <= tolerance:
                return variant
        found = min(errors, key=lambda variant: errors[variant])
        if errors[found] <= tolerance:
            return found
        named = ", ".join(length.name for length in lengths)
        return (
            f"cannot reproduce the attention of layer {layer} from its queries and keys (relative "
            f"error {errors[found]:.2g}): the model computes its scores in an unknown way"
            + (f"; the configuration sets {named}" if named else "")
        )

    def _candidates(self, layer: int, lengths: list[Length]) -> Iterator[AttentionVariant]:
        windows = [None, *lengths]
        rotations_of_layer = range(len(self._rotations(layer)))
        layouts = range(self._finder(layer).layouts(self.settings))
        capped = [False] if self.settings.soft_cap is None else [True, False]
        scaled = [False] if self.settings.query_scaling is None else [True, False]
        for one in product(windows, rotations_of_layer, layouts, capped, scaled):
            yield AttentionVariant(*one)

    def _rotations(self, layer: int) -> list[RotationOfLength]:
        kinds = getattr(self._config, "layer_types", None)
        kind = None if kinds is None else kinds[layer]
        return rotations(self._model, self._modules, layer, kind)

    def _block(self, layer: int, variant: AttentionVariant) -> Block:
        length = None if variant.window is None else variant.window.of_layer(layer)
        chunked = variant.window is not None and variant.window.path[-1] == CHUNK
        rotation = self._rotations(layer)[variant.rotation]
        settings = replace(
            self.settings,
            soft_cap=self.settings.soft_cap if variant.capped else None,
            query_scaling=self.settings.query_scaling if variant.scaled else None,
            window=None if chunked else length,
            chunk=length if chunked else None,
        )
        return self._finder(layer).block(settings, rotation, variant.layout)

    def blocks(
        self, variants: list[AttentionVariant | str]
    ) -> tuple[list[Block | str], _PartSizes]:
        """Build the blocks. Lengths of windows are looked up in this model's configuration.

        Raises `ModelFailed` if the parts of no block are known.
        """
        own = {length.path: length for length in lengths_of(self._config)}
        blocks: list[Block | str] = []
        for layer, variant in enumerate(variants):
            if isinstance(variant, str):
                blocks.append(variant)
                continue
            window = None if variant.window is None else own[variant.window.path]
            blocks.append(self._block(layer, replace(variant, window=window)))
        known = [block for block in blocks if isinstance(block, Block)]
        if not known:
            raise ModelFailed(next(block for block in blocks if isinstance(block, str)))
        attentions = [block.attention for block in known if block.attention is not None]
        mlps = [block.mlp for block in known if block.mlp is not None]
        experts = [mlp for mlp in mlps if isinstance(mlp, Experts)]
        sizes = _PartSizes(
            n_heads=self.settings.n_heads if attentions else 0,
            n_kv_heads=max((each.n_kv_heads for each in attentions), default=0),
            d_head=max((each.output.d_in for each in attentions), default=0)
            // self.settings.n_heads,
            d_mlp=experts[0].width if experts else mlps[0].n_neurons if mlps else 0,
            n_experts=experts[0].count if experts else 0,
        )
        return blocks, sizes


def _is_too_wide(attention: Attention) -> bool:
    """Whether a rotation, of layers with wider heads, does not fit the heads of this one."""
    if attention.rotation is None:
        return False
    return attention.rotation(1).cos.shape[-1] > attention.query.d_out // attention.n_heads


def _required(config: Any, name: str) -> int:
    """Return a size that every decoder with attention has, one for all its layers.

    Raises `ModelFailed` without it.
    """
    if name in (config.per_layer_attributes or ()):
        raise ModelFailed(
            f"{name} of {config.model_type} depends on the layer: expected one number for all"
        )
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ModelFailed(
            f"the configuration of {config.model_type} has no {name}: expected a decoder with "
            "attention"
        )
    return value


def _settings(config: Any) -> BlockSettings:
    return BlockSettings(
        n_heads=_required(config, "num_attention_heads"),
        soft_cap=getattr(config, "attn_logit_softcapping", None),
        query_scaling=_query_scaling(config),
        residual_multiplier=_residual_multiplier(config),
    )


def _residual_multiplier(config: Any) -> float:
    """Return the factor of what a sublayer adds; in MiniCPM 3 it depends on the depth."""
    depth = getattr(config, "scale_depth", None)
    if depth is not None:
        return float(depth) / math.sqrt(config.num_hidden_layers)
    return float(getattr(config, "residual_multiplier", None) or 1.0)


def _query_scaling(config: Any) -> QueryScaling | None:
    """Return how Llama 4 and Ministral 3 scale queries by their position, if so configured."""
    if getattr(config, "attn_temperature_tuning", False):
        return QueryScaling(float(config.attn_scale), int(config.floor_scale), offset=1)
    rope = getattr(config, "rope_parameters", None) or {}
    beta, length = (
        rope.get(name) for name in ("llama_4_scaling_beta", "original_max_position_embeddings")
    )
    return QueryScaling(float(beta), int(length)) if beta and length else None


def rotations(
    network: nn.Module, blocks: list[nn.Module], layer: int, kind: str | None
) -> list[RotationOfLength]:
    """List the rotations that `layer` may use; the first is None.

    They come from the block's own rotary embedding if it has one, else from those of the model. If
    an embedding has one rotation per kind of layer, that of the layer's `kind` is first.
    """
    inside = {module for block in blocks for module in block.modules()}
    own = [module for module in blocks[layer].modules() if _is_rotary(module)]
    shared = [m for m in network.modules() if _is_rotary(m) and m not in inside]
    found: list[RotationOfLength] = [None]
    for rotary in own or shared:
        for which in _choices(rotary, kind):
            found += [partial(_rotation, rotary, which, pairing) for pairing in range(PAIRINGS)]
    tables = (m for m in network.modules() if hasattr(m, "embed_positions") and m not in inside)
    found += [table_rotation(m) for m in tables if isinstance(m.embed_positions, torch.Tensor)]
    return found


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def _choices(rotary: Any, kind: str | None) -> list[dict[str, str]]:
    """List the keyword arguments that select a rotation of the module."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return [{}]
    kinds = [
        name.removesuffix("_inv_freq")
        for name, _ in rotary.named_buffers(recurse=False)
        if name.endswith("_inv_freq") and not name.endswith("original_inv_freq")
    ]
    return [{"layer_type": k} for k in sorted(kinds, key=lambda k: (k != kind, k))]


def _rotation(rotary: Any, which: dict[str, str], pairing: int, length: int) -> Rotation:
    device = next(rotary.buffers()).device
    positions = torch.arange(length, device=device)[None]
    turns = rotary(torch.empty(0, device=device), positions, **which)
    if isinstance(turns, torch.Tensor):  # complex numbers, one for each pair
        turns = (torch.cat([part, part], dim=-1) for part in (turns.real, turns.imag))
    cos, sin = turns
    return pairings(cos[0], sin[0])[pairing]


def pairings(cos: torch.Tensor, sin: torch.Tensor) -> list[Rotation]:
    """List the ways in which models use their rotary embedding's output `[pos, rotary]`.

    These are pairs half a head apart; neighbouring pairs; neighbouring pairs that take each angle
    from the first half; and pairs half a head apart that turn the other way.
    """
    cos_twice, sin_twice = (
        angles.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for angles in (cos, sin)
    )
    return [
        Rotation(cos, sin, interleaved=False),
        Rotation(cos, sin, interleaved=True),
        Rotation(cos_twice, sin_twice, interleaved=True),
        Rotation(cos, -sin, interleaved=False),
    ]

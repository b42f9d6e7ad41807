"""Map a decoder without an adapter by its structure, observed in one forward pass.

Details that no tensor shows, such as the window or the pairing of rotary dimensions, have few
candidates. The candidate whose recomputed attention equals the model's is used. The self-check
refuses a wrong result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture import Rotation
from januslens_server.errors import ModelFailed
from januslens_server.graph.weights import QueryScaling
from januslens_server.lens.cpu import Unembedding
from januslens_server.lens.head import LensHead
from januslens_server.models.adapters.observed_block import (
    BlockFinder,
    BlockSettings,
    ObservedPass,
    is_norm,
    observe,
    observed_ids,
    read_norm,
    same_memory,
)
from januslens_server.models.lengths import (
    TOLERANCE,
    Length,
    attention_error,
    captured_layers,
    lengths_of,
    miniature,
    prompt_of,
)
from januslens_server.models.vetting import one_line
from januslens_server.models.views import Block, ModelView
from januslens_server.results import MatrixKind, ModelFacts

# Maximum relative error of the heads' results in the model's data type: the right candidate differs
# by rounding, a wrong one by tens of per cent.
COARSE = 5e-2

# The number of `pairings`.
PAIRINGS = 3

# A function from length to rotation; None if queries and keys are not rotated.
RotationOfLength = Callable[[int], Rotation] | None


@dataclass(frozen=True)
class AttentionVariant:
    """A candidate for how a layer's attention works.

    `window` is the field with the window's length, or None. `rotation` is an index into the layer's
    `rotations`. `capped` and `scaled` say whether the layer uses the configuration's soft-cap of
    scores and its scaling of queries by position.
    """

    window: Length | None
    rotation: int
    capped: bool = False
    scaled: bool = False


def view(model: PreTrainedModel) -> ModelView:
    """Map a decoder-only model that has no adapter.

    Looks for a list of blocks of one class with the length that the configuration states. Each
    block has three linear maps with one input (query, key, value), one output map, and two or three
    maps of an MLP. Norms are recognised by their results. A layer's window and rotation are those
    that reproduce the model's attention; if the configuration names lengths, at every position of a
    miniature with short lengths.

    Raises:
        ModelFailed: A part is missing or ambiguous, or the attention is not reproduced.
    """
    try:
        return _view(model)
    except (
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:  # raised for configurations and modules that are not decoders
        raise ModelFailed(
            f"the structure of {model.config.model_type} is unknown: {one_line(error)}"
        ) from error


def _view(model: PreTrainedModel) -> ModelView:
    structure = Structure(model)
    lengths = lengths_of(model.config)
    if lengths:
        variants = _variants_beyond(model, structure, lengths)
    else:
        variants = structure.variants(observed_ids(model), [], COARSE, best=True)
    return structure.view(variants)


def _variants_beyond(
    model: PreTrainedModel, structure: Structure, lengths: list[Length]
) -> list[AttentionVariant]:
    """Find the variants that reproduce attention at every position of a miniature."""
    attention = structure.first_block.attention
    d_head = structure.query_width // attention.n_heads
    small = miniature(model, attention.n_heads, attention.n_kv_heads, d_head, lengths)
    ids = prompt_of(small)
    return Structure(small).variants(ids, lengths_of(small.config), TOLERANCE, best=False)


class Structure:
    """A decoder's structure from an observed pass: everything that does not depend on a variant."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Observe a forward pass and find the blocks. Raises `ModelFailed` if one is missing."""
        self._model = model
        self._config: Any = model.config.get_text_config()
        self._embedding = _embedding(model.get_input_embeddings(), "input embedding")
        self._head = _embedding(model.get_output_embeddings(), "output embedding")
        self.settings = _settings(self._config)
        name, self._modules = _blocks(model, _required(self._config, "num_hidden_layers"))
        self._observed = observe(model)
        self._finders = [
            BlockFinder(f"{name}.{i}", module, self._observed)
            for i, module in enumerate(self._modules)
        ]

    @property
    def query_width(self) -> int:
        """Width of all heads' queries together."""
        return self._finders[0].query_width

    @property
    def first_block(self) -> Block:
        """The first block, without a window or a rotation."""
        return self._block(0, AttentionVariant(None, 0))

    def variants(
        self, ids: torch.Tensor, lengths: list[Length], tolerance: float, *, best: bool
    ) -> list[AttentionVariant]:
        """Find the variant of each layer that reproduces the captured attention.

        With `best`, the one with the smallest error at the last position of `ids` `[1, pos]`, else
        the first within `tolerance` at every position.

        Raises:
            ModelFailed: No variant is within the tolerance.
        """
        last = ids.shape[1] - 1
        positions = [last] if best else list(range(last, -1, -1))
        plain = [self._block(i, AttentionVariant(None, 0)) for i in range(len(self._modules))]
        captured = captured_layers(self._model, ids, plain)
        return [
            self._variant(layer, captured[layer], lengths, positions, tolerance, best)
            for layer in range(len(self._modules))
        ]

    def _variant(
        self,
        layer: int,
        captured: dict[str, torch.Tensor],
        lengths: list[Length],
        positions: list[int],
        tolerance: float,
        best: bool,
    ) -> AttentionVariant:
        errors: dict[AttentionVariant, float] = {}
        for variant in self._candidates(layer, lengths):
            block = self._block(layer, variant)
            errors[variant] = attention_error(block, captured, positions, tolerance)
            if not best and errors[variant] <= tolerance:
                return variant
        found = min(errors, key=lambda variant: errors[variant])
        if errors[found] <= tolerance:
            return found
        named = ", ".join(length.name for length in lengths)
        raise ModelFailed(
            f"cannot reproduce the attention of layer {layer} from its queries and keys (relative "
            f"error {errors[found]:.2g}): the model computes its scores in an unknown way"
            + (f"; the configuration sets {named}" if named else "")
        )

    def _candidates(self, layer: int, lengths: list[Length]) -> Iterator[AttentionVariant]:
        windows = [None, *lengths]
        rotations_of_layer = range(len(self._rotations(layer)))
        capped = [False] if self.settings.soft_cap is None else [True, False]
        scaled = [False] if self.settings.query_scaling is None else [True, False]
        for one in product(windows, rotations_of_layer, capped, scaled):
            yield AttentionVariant(*one)

    def _rotations(self, layer: int) -> list[RotationOfLength]:
        kinds = getattr(self._config, "layer_types", None)
        kind = None if kinds is None else kinds[layer]
        return rotations(self._model, self._modules, layer, kind)

    def _block(self, layer: int, variant: AttentionVariant) -> Block:
        window = None if variant.window is None else variant.window.of_layer(layer)
        rotation = self._rotations(layer)[variant.rotation]
        settings = replace(
            self.settings,
            soft_cap=self.settings.soft_cap if variant.capped else None,
            query_scaling=self.settings.query_scaling if variant.scaled else None,
        )
        return self._finders[layer].block(settings, rotation, window)

    def view(self, variants: list[AttentionVariant]) -> ModelView:
        """Build the view. Lengths of windows are looked up in this model's configuration."""
        own = {length.path: length for length in lengths_of(self._config)}
        blocks = []
        for layer, variant in enumerate(variants):
            window = None if variant.window is None else own[variant.window.path]
            blocks.append(self._block(layer, replace(variant, window=window)))
        return ModelView(
            embedding=self._embedding,
            blocks=tuple(blocks),
            lens=_lens(self._config, self._head, self._observed, self._modules[-1]),
            facts=_facts(self._config, self.settings, blocks[0], self._embedding, self._head),
        )


def _required(config: Any, name: str) -> int:
    """Return a size that every decoder with attention has. Raises `ModelFailed` without it."""
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
        residual_multiplier=float(getattr(config, "residual_multiplier", None) or 1.0),
    )


def _query_scaling(config: Any) -> QueryScaling | None:
    """Return how Ministral 3 scales queries beyond its original context, if so configured."""
    rope = getattr(config, "rope_parameters", None) or {}
    beta, length = (
        rope.get(name) for name in ("llama_4_scaling_beta", "original_max_position_embeddings")
    )
    return QueryScaling(float(beta), int(length)) if beta and length else None


def _facts(
    config: Any, settings: BlockSettings, first: Block, embedding: Any, head: Any
) -> ModelFacts:
    query, ff2 = first.matrices[MatrixKind.Q], first.matrices[MatrixKind.FF2]
    return ModelFacts(
        n_layers=_required(config, "num_hidden_layers"),
        n_heads=settings.n_heads,
        n_kv_heads=first.attention.n_kv_heads,
        d_model=embedding.weight.shape[1],
        d_head=query.rows_of(query.parameter()).shape[1] // settings.n_heads,
        d_mlp=ff2.rows_of(ff2.parameter()).shape[0],
        n_experts=0,
        vocab_size=head.weight.shape[0],
        max_positions=_required(config, "max_position_embeddings"),
    )


def _embedding(module: Any, what: str) -> Any:
    """Return an input or output embedding. Raises `ModelFailed` for another kind of module."""
    if not isinstance(module, nn.Embedding | nn.Linear):
        raise ModelFailed(
            f"the {what} is a {type(module).__name__}: expected an Embedding or a Linear"
        )
    return module


def _blocks(model: PreTrainedModel, n_layers: int) -> tuple[str, list[nn.Module]]:
    """Find the only list of `n_layers` modules of one class, and its name."""
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and len({type(block) for block in module}) == 1
    ]
    if len(lists) != 1:
        raise ModelFailed(f"found {len(lists)} lists of {n_layers} equal blocks: expected one")
    return lists[0]


def _lens(config: Any, head: Any, observed: ObservedPass, last_block: nn.Module) -> LensHead:
    """Build the lens from the norm that reads the last block's output, and the output head."""
    block = observed.of(last_block)
    norms = [
        call
        for call in observed.calls
        if is_norm(call.module) and block is not None and same_memory(call.input, block.output)
    ]
    if len(norms) != 1:
        raise ModelFailed(f"found {len(norms)} norms after the last block: expected one")
    bias = None if head.bias is None else head.bias.detach().float()
    return LensHead(
        final_norm=read_norm(norms[0]),
        unembedding=Unembedding(head.weight),
        bias=bias,
        logit_scale=_logit_scale(config),
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _logit_scale(config: Any) -> float:
    """The factor of the logits, which families name differently."""
    if getattr(config, "logits_scaling", None):
        return 1 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


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
    cos, sin = rotary(torch.empty(0, device=device), positions, **which)
    return pairings(cos[0], sin[0])[pairing]


def pairings(cos: torch.Tensor, sin: torch.Tensor) -> list[Rotation]:
    """List the ways in which models use their rotary embedding's output `[pos, rotary]`.

    These are pairs half a head apart; neighbouring pairs; and neighbouring pairs that take each
    angle from the first half.
    """
    cos_twice, sin_twice = (
        angles.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for angles in (cos, sin)
    )
    return [
        Rotation(cos, sin, interleaved=False),
        Rotation(cos, sin, interleaved=True),
        Rotation(cos_twice, sin_twice, interleaved=True),
    ]

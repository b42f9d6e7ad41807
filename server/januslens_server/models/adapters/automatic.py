"""Read a decoder that has no adapter by its structure, observed in one forward pass.

A wrong reading is refused by the self-check.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture import Rotation
from januslens_server.errors import ModelFailed
from januslens_server.lens.head import LensHead
from januslens_server.lens.unembedding import Unembedding
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
from januslens_server.models.views import Block, ModelView
from januslens_server.results import MatrixKind, ModelFacts

# Relative error of the heads' results in the model's own data type; the right reading is off by
# rounding, a wrong one by tens of per cent.
COARSE = 5e-2

# The number of `pairings`.
PAIRINGS = 3

# None: queries and keys are not rotated.
RotationOfLength = Callable[[int], Rotation] | None


@dataclass(frozen=True)
class Reading:
    """One way in which a layer's attention may work: its window (None: no window), its rotation.

    `rotation` counts the `rotations` of the layer.
    """

    window: Length | None
    rotation: int


def view(model: PreTrainedModel) -> ModelView:
    """The parts of a decoder-only model that has no adapter.

    Looks for: a list of equal blocks as long as the configuration says; in each, three linear
    maps with one input (query, key, value), one that joins the heads, and two or three of an
    MLP; norms by what they do; rotary embeddings. Which window and rotation a layer uses is found
    by which gives the model's own attention, at every position of a miniature whose lengths are
    short if the configuration names any. Raises `ModelFailed` naming what is missing.
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
    ) as error:  # what transformers raises of configurations and modules that are not decoders
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise ModelFailed(
            f"the structure of {model.config.model_type} cannot be read: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _view(model: PreTrainedModel) -> ModelView:
    structure = Structure(model)
    lengths = lengths_of(model.config)
    if lengths:
        readings = _readings_beyond(model, structure, lengths)
    else:
        readings = structure.readings(observed_ids(model), [], COARSE, best=True)
    return structure.view(readings)


def _readings_beyond(
    model: PreTrainedModel, structure: Structure, lengths: list[Length]
) -> list[Reading]:
    """The readings that hold at every position of a miniature."""
    own = structure.settings
    small = miniature(model, own.n_heads, own.n_kv_heads, structure.d_head, lengths)
    ids = prompt_of(small)
    return Structure(small).readings(ids, lengths_of(small.config), TOLERANCE, best=False)


class Structure:
    """What an observed pass shows of a decoder: everything that does not depend on a reading."""

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
    def d_head(self) -> int:
        """The width of a head's query."""
        return self._finders[0].query_width // self.settings.n_heads

    def readings(
        self, ids: torch.Tensor, lengths: list[Length], tolerance: float, *, best: bool
    ) -> list[Reading]:
        """Each layer's reading under which its attention, recomputed, is the captured one.

        The `best` at the last position, or the first that holds at every position. Raises
        `ModelFailed` if there is none.
        """
        last = ids.shape[1] - 1
        positions = [last] if best else list(range(last, -1, -1))
        plain = [self._block(i, Reading(None, 0)) for i in range(len(self._modules))]
        captured = captured_layers(self._model, ids, plain)
        return [
            self._reading(layer, captured[layer], lengths, positions, tolerance, best)
            for layer in range(len(self._modules))
        ]

    def _reading(
        self,
        layer: int,
        captured: dict[str, torch.Tensor],
        lengths: list[Length],
        positions: list[int],
        tolerance: float,
        best: bool,
    ) -> Reading:
        errors: dict[Reading, float] = {}
        for reading in self._candidates(layer, lengths):
            block = self._block(layer, reading)
            errors[reading] = attention_error(block, captured, positions, tolerance)
            if not best and errors[reading] <= tolerance:
                return reading
        found = min(errors, key=lambda reading: errors[reading])
        if errors[found] <= tolerance:
            return found
        named = ", ".join(length.name for length in lengths)
        raise ModelFailed(
            f"expected to reproduce the attention of layer {layer} from its queries and keys, "
            f"got an error of {errors[found]:.2g}: its scores are made in a way not known here"
            + (f"; the configuration sets {named}" if named else "")
        )

    def _candidates(self, layer: int, lengths: list[Length]) -> Iterator[Reading]:
        windows = [None, *lengths]
        for window in windows:
            for rotation in range(len(self._rotations(layer))):
                yield Reading(window, rotation)

    def _rotations(self, layer: int) -> list[RotationOfLength]:
        kinds = getattr(self._config, "layer_types", None)
        kind = None if kinds is None else kinds[layer]
        return rotations(self._model, self._modules, layer, kind)

    def _block(self, layer: int, reading: Reading) -> Block:
        window = None if reading.window is None else reading.window.of_layer(layer)
        rotation = self._rotations(layer)[reading.rotation]
        return self._finders[layer].block(self.settings, rotation, window)

    def view(self, readings: list[Reading]) -> ModelView:
        """The model's parts; a reading's window is a field, whose value is this model's own."""
        own = {length.path: length for length in lengths_of(self._config)}
        blocks = []
        for layer, reading in enumerate(readings):
            window = None if reading.window is None else own[reading.window.path]
            blocks.append(self._block(layer, replace(reading, window=window)))
        return ModelView(
            embedding=self._embedding,
            blocks=tuple(blocks),
            lens=_lens(self._config, self._head, self._observed, self._modules[-1]),
            facts=_facts(self._config, self.settings, blocks[0], self._embedding, self._head),
        )


def _required(config: Any, name: str) -> int:
    """A size that every decoder with attention has."""
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ModelFailed(
            f"expected a decoder with attention, whose configuration has {name}, got "
            f"{config.model_type} without it"
        )
    return value


def _settings(config: Any) -> BlockSettings:
    n_heads = _required(config, "num_attention_heads")
    return BlockSettings(
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        soft_cap=getattr(config, "attn_logit_softcapping", None),
        residual_multiplier=float(getattr(config, "residual_multiplier", None) or 1.0),
    )


def _facts(
    config: Any, settings: BlockSettings, first: Block, embedding: Any, head: Any
) -> ModelFacts:
    query, ff2 = first.matrices[MatrixKind.Q], first.matrices[MatrixKind.FF2]
    return ModelFacts(
        n_layers=_required(config, "num_hidden_layers"),
        n_heads=settings.n_heads,
        n_kv_heads=settings.n_kv_heads,
        d_model=embedding.weight.shape[1],
        d_head=query.rows_of(query.parameter()).shape[1] // settings.n_heads,
        d_mlp=ff2.rows_of(ff2.parameter()).shape[0],
        n_experts=0,
        vocab_size=head.weight.shape[0],
        max_positions=_required(config, "max_position_embeddings"),
    )


def _embedding(module: Any, what: str) -> Any:
    """The embedding at either end of the model."""
    if not isinstance(module, nn.Embedding | nn.Linear):
        raise ModelFailed(f"expected an {what}, got {type(module).__name__}")
    return module


def _blocks(model: PreTrainedModel, n_layers: int) -> tuple[str, list[nn.Module]]:
    """The one list of `n_layers` modules of one class, and its name."""
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and len({type(block) for block in module}) == 1
    ]
    if len(lists) != 1:
        raise ModelFailed(f"expected one list of {n_layers} equal blocks, found {len(lists)}")
    return lists[0]


def _lens(config: Any, head: Any, observed: ObservedPass, last_block: nn.Module) -> LensHead:
    """The norm that takes the last block's output, and the head with its multiplier and cap."""
    block = observed.of(last_block)
    norms = [
        call
        for call in observed.calls
        if is_norm(call.module) and block is not None and same_memory(call.input, block.output)
    ]
    if len(norms) != 1:
        raise ModelFailed(f"expected one norm after the last block, found {len(norms)}")
    bias = None if head.bias is None else head.bias.detach().float()
    return LensHead(
        final_norm=read_norm(norms[0]),
        unembedding=Unembedding(head.weight),
        bias=bias,
        logit_scale=_logit_scale(config),
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _logit_scale(config: Any) -> float:
    """What families multiply or divide their logits by."""
    if getattr(config, "logits_scaling", None):
        return 1 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


def rotations(
    network: nn.Module, blocks: list[nn.Module], layer: int, kind: str | None
) -> list[RotationOfLength]:
    """Every reading of the rotary embeddings that `layer` could use; the first is none at all.

    The layer's own embedding, if its block has one, or those of the whole model. Embeddings that
    hold one rotation for each kind of layer give that of the layer's own `kind`, then the others.
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
    """The keyword arguments that select a rotation of the module."""
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
    """What models make of the `[pos, rotary]` that their rotary embedding gives.

    Pairs half a head apart; neighbouring pairs; neighbouring pairs that take each angle from the
    first half.
    """
    cos_twice, sin_twice = (
        angles.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for angles in (cos, sin)
    )
    return [
        Rotation(cos, sin, interleaved=False),
        Rotation(cos, sin, interleaved=True),
        Rotation(cos_twice, sin_twice, interleaved=True),
    ]

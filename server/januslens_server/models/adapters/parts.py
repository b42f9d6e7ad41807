"""Reading the modules that architecture families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture import End, Rotation, Tap
from januslens_server.capture.taps import Columns
from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.graph.weights import Finish
from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.lens.unembedding import Unembedding
from januslens_server.models.matrices import Linear
from januslens_server.models.views import Attention, Mlp
from januslens_server.results import ModelFacts

Sublayer = TypeVar("Sublayer", Attention, Mlp)


def linear(module: nn.Module, columns: Columns | None = None) -> Linear:
    """An `nn.Linear`, which stores its weight transposed, or some of its columns."""
    return Linear(module, stored_as_rows=False, columns=columns)


def consecutive(module: nn.Module, *widths: int) -> tuple[Linear, ...]:
    """Maps of the given widths that one `nn.Linear` holds one after the other."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return tuple(
        linear(module, range(end - width, end)) for end, width in zip(ends, widths, strict=True)
    )


def by_head(module: nn.Module, n_heads: int, d_head: int, group: int = 1) -> tuple[Linear, ...]:
    """Query, key and value of one `nn.Linear` that holds them group by group.

    For each key-value head in turn stand the queries of the `group` heads that share it, its key
    and its value.
    """
    places: tuple[list[int], ...] = ([], [], [])
    for slot in range(n_heads // group * (group + 2)):
        part = max(0, slot % (group + 2) - group + 1)
        places[part].extend(range(slot * d_head, (slot + 1) * d_head))
    return tuple(linear(module, tuple(columns)) for columns in places)


def layer_norm(module: Any, device: torch.device | None = None) -> Norm:
    """An `nn.LayerNorm`; one without learned numbers works on the `device`."""
    weight = module.weight
    if weight is None:
        weight = torch.ones(module.normalized_shape, device=device)
    bias = None if module.bias is None else module.bias.detach().float()
    return Norm(weight.detach().float(), bias, module.eps, centred=True)


def rms_norm(module: Any) -> Norm:
    """A Llama-like RMSNorm, which names its epsilon `variance_epsilon`."""
    return Norm(module.weight.detach().float(), None, module.variance_epsilon, centred=False)


def rms_head_map(module: Any) -> HeadMap:
    """A Llama-like RMSNorm of each head's queries or keys."""
    return HeadMap(norm=HeadNorm(module.weight.detach().float(), module.variance_epsilon))


def finished(sublayer: Sublayer, module: nn.Module, norm: Norm) -> Sublayer:
    """The sublayer with the post-norm `module` behind it, whose numbers are `norm`."""
    return replace(sublayer, finish=Finish(norm), added=Tap(module, End.OUTPUT))


def rotation(decoder: Any, interleaved: bool = False, **which: Any) -> Callable[[int], Rotation]:
    """The model's own cosines and sines for a prompt of a given length, in its own data type.

    `which` goes to the rotary module, which may hold several rotations.
    """

    def of_length(length: int) -> Rotation:
        device = next(decoder.rotary_emb.buffers()).device  # weights may be offloaded
        positions = torch.arange(length, device=device)[None]
        like = torch.empty(0, dtype=decoder.dtype, device=device)
        cos, sin = decoder.rotary_emb(like, positions, **which)
        return Rotation(cos[0], sin[0], interleaved)

    return of_length


def run_eagerly(model: PreTrainedModel) -> None:
    """Turn SDPA off: in some releases of transformers it passes over part of a family's scoring."""
    if model.config._attn_implementation == "sdpa":  # noqa: SLF001 - no public reader
        model.set_attn_implementation("eager")


def lens(
    model: PreTrainedModel,
    final_norm: Norm,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
) -> LensHead:
    """The final norm and the model's head, tied or not."""
    head: Any = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return LensHead(
        final_norm,
        Unembedding(head.weight),
        None if bias is None else bias.detach().float(),
        logit_scale,
        soft_cap,
    )


def facts(
    model: PreTrainedModel,
    *,
    d_mlp: int,
    max_positions: int,
    n_kv_heads: int | None = None,
    d_head: int | None = None,
) -> ModelFacts:
    """The sizes, most of which every configuration can name alike.

    As many key-value heads as heads, and heads that share d_model evenly, unless said otherwise.
    """
    config: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    n_heads = config.num_attention_heads
    return ModelFacts(
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
        d_model=config.hidden_size,
        d_head=config.hidden_size // n_heads if d_head is None else d_head,
        d_mlp=d_mlp,
        n_experts=0,
        vocab_size=head.weight.shape[0],
        max_positions=max_positions,
    )

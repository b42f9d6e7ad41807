"""Map the modules that many architecture families share to parts of a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture import End, Rotation, Tap
from januslens_server.capture.hooks import Columns
from januslens_server.graph.weights import Finish, HeadMap, HeadNorm
from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.lens.unembedding import Unembedding
from januslens_server.models.matrices import Linear
from januslens_server.models.views import Attention, Mlp
from januslens_server.results import ModelFacts

Sublayer = TypeVar("Sublayer", Attention, Mlp)


def linear(module: nn.Module, columns: Columns | None = None) -> Linear:
    """Map an `nn.Linear`, whose weight is stored transposed, or some of its output columns."""
    return Linear(module, stored_as_rows=False, columns=columns)


def consecutive(module: nn.Module, *widths: int) -> tuple[Linear, ...]:
    """Split one `nn.Linear` into consecutive maps of the given output widths."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return tuple(
        linear(module, range(end - width, end)) for end, width in zip(ends, widths, strict=True)
    )


def by_head(module: nn.Module, n_heads: int, d_head: int, group: int = 1) -> tuple[Linear, ...]:
    """Split one `nn.Linear` that stores query, key and value group by group.

    Each key-value head has the queries of the `group` heads that share it, then its key, then its
    value.
    """
    places: tuple[list[int], ...] = ([], [], [])
    for slot in range(n_heads // group * (group + 2)):
        part = max(0, slot % (group + 2) - group + 1)
        places[part].extend(range(slot * d_head, (slot + 1) * d_head))
    return tuple(linear(module, tuple(columns)) for columns in places)


def layer_norm(module: Any, device: torch.device | None = None) -> Norm:
    """Map an `nn.LayerNorm`. `device` is where a norm without weights computes."""
    weight = module.weight
    if weight is None:
        weight = torch.ones(module.normalized_shape, device=device)
    bias = None if module.bias is None else module.bias.detach().float()
    return Norm(weight.detach().float(), bias, module.eps, centred=True)


def rms_norm(module: Any) -> Norm:
    """Map an RMSNorm like Llama's, whose epsilon is called `variance_epsilon`."""
    return Norm(module.weight.detach().float(), None, module.variance_epsilon, centred=False)


def rms_head_map(module: Any) -> HeadMap:
    """Map an RMSNorm like Llama's over each head's queries or keys."""
    return HeadMap(norm=HeadNorm(module.weight.detach().float(), module.variance_epsilon))


def spanning_head_map(module: Any, d_head: int, clip_after: float | None = None) -> HeadMap:
    """Map an RMSNorm of queries or keys whose mean square spans all heads, then a clip."""
    norm = rms_norm(module)
    weight = norm.weight.unflatten(0, (-1, d_head))
    return HeadMap(norm=HeadNorm(weight, norm.eps, spans_heads=True), clip_after=clip_after)


def norm_tap(module: nn.Module, *, heads_first: bool = False) -> Tap:
    """Return the tap of the output of a norm of queries or keys."""
    return Tap(module, End.OUTPUT, heads_first=heads_first)


def with_post_norm(sublayer: Sublayer, module: nn.Module, norm: Norm) -> Sublayer:
    """Add a post-norm to a sublayer: its `module`, and its weights as `norm`."""
    return replace(sublayer, finish=Finish(norm), added=Tap(module, End.OUTPUT))


def rotation(decoder: Any, interleaved: bool = False, **which: Any) -> Callable[[int], Rotation]:
    """Return a function from a prompt's length to the model's cosines and sines, in its data type.

    `which` holds keyword arguments for the rotary module, which may have several rotations.
    """

    def of_length(length: int) -> Rotation:
        device = next(decoder.rotary_emb.buffers()).device  # weights may be offloaded
        positions = torch.arange(length, device=device)[None]
        like = torch.empty(0, dtype=decoder.dtype, device=device)
        cos, sin = decoder.rotary_emb(like, positions, **which)
        return Rotation(cos[0], sin[0], interleaved)

    return of_length


def table_rotation(holder: Any) -> Callable[[int], Rotation]:
    """Return the rotation of neighbouring pairs by a table of sines, then cosines, by position."""

    def of_length(length: int) -> Rotation:
        sin, cos = holder.embed_positions[:length].chunk(2, dim=-1)
        cos, sin = (angles.repeat_interleave(2, dim=-1) for angles in (cos, sin))
        return Rotation(cos, sin, interleaved=True)

    return of_length


def run_eagerly(model: PreTrainedModel) -> None:
    """Replace SDPA by eager attention: some releases of transformers omit scoring steps in SDPA."""
    if model.config._attn_implementation == "sdpa":  # noqa: SLF001 - no public reader
        model.set_attn_implementation("eager")


def lens(
    model: PreTrainedModel,
    final_norm: Norm,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
) -> LensHead:
    """Build the lens from the final norm and the model's output head."""
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
    """Collect the model's sizes from its configuration.

    By default `n_kv_heads` is the number of heads and `d_head` is `d_model / n_heads`.
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

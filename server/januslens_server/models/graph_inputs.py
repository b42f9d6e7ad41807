"""Convert a block's weights and captured activations to the form that the flow graph reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from januslens_server.capture import (
    OF_ATTENTION,
    OF_MLP,
    End,
    HiddenSources,
    LayerActivations,
    NeuronChange,
    StreamActivations,
    Tap,
)
from januslens_server.capture.hooks import rows
from januslens_server.graph.mlp import DenseMlp
from januslens_server.graph.weights import AttentionWeights, BlockWeights, Finish, MixerWeights
from januslens_server.models.experts import Experts
from januslens_server.models.views import Attention, Block, CoarseBlock, Mlp
from januslens_server.transfer import DeviceIndex


def block_weights(block: Block) -> BlockWeights:
    """A block's weights as float32 tensors in the row convention; views of a float32 model's."""
    mlp = None
    if block.mlp is not None:
        mlp = _dense(block.mlp) if isinstance(block.mlp, Mlp) else block.mlp.mlp()
    return BlockWeights(
        attention=None if block.attention is None else _attention_weights(block.attention),
        mlp=mlp,
        attention_prenorm=block.attention_prenorm,
        mlp_prenorm=block.mlp_prenorm,
        multiplier=block.multiplier,
        mixer_after_mid=all(each.after_mid for each in block.beside),
    )


def _attention_weights(attention: Attention) -> AttentionWeights:
    if attention.latent is None:
        query = attention.query.weight.float()
        key = attention.key.weight.float().unflatten(1, (attention.n_kv_heads, -1))
    else:
        query = attention.latent.query(attention.query)
        key = attention.latent.key(attention.key, attention.n_kv_heads)
    query = query.unflatten(1, (attention.n_heads, -1))
    output = attention.output.weight.float().unflatten(0, (attention.n_heads, -1))
    return AttentionWeights(
        query=query.transpose(0, 1),
        key=key.transpose(0, 1),
        output=output,
        bias=None if attention.output.bias is None else attention.output.bias.float(),
        row_norms=attention.output.row_norms,
        scoring=attention.scoring,
        query_map=attention.query_map,
        key_map=attention.key_map,
        value_map=attention.value_map,
        finish=attention.finish,
    )


def mixer_weights(block: CoarseBlock) -> MixerWeights | None:
    """The output map of a block's mixer with heads; None without one."""
    mixer = block.mixer
    if mixer is None or mixer.heads is None:
        return None
    found, bias = mixer.heads.output, mixer.heads.output.bias
    weight = found.weight.float().unflatten(0, (mixer.heads.count, -1))
    return MixerWeights(
        output=weight if mixer.multiplier == 1.0 else weight * mixer.multiplier,
        bias=None if bias is None else bias.float() * mixer.multiplier,
    )


def _dense(mlp: Mlp) -> DenseMlp:
    return DenseMlp(
        ff1=mlp.ff1.weight.float(),
        up=None if mlp.up is None else mlp.up.weight.float(),
        ff2=mlp.ff2.weight.float(),
        bias=None if mlp.ff2.bias is None else mlp.ff2.bias.float(),
        row_norms=mlp.ff2.row_norms,
        finish=mlp.finish,
    )


def layer_taps(block: Block | CoarseBlock) -> dict[str, Tap]:
    """Taps that a forward pass captures of a block, by field name of its activations."""
    stream = {
        "block_input": Tap(block.module, End.INPUT),
        "block_output": Tap(block.module, End.OUTPUT),
    }
    others = block.sublayers if isinstance(block, CoarseBlock) else block.beside
    added = {f"sublayer_{i}": each.output for i, each in enumerate(others)}
    if isinstance(block, CoarseBlock):
        mid = {} if block.residual_mid is None else {"residual_mid": block.residual_mid}
        heads = None if block.mixer is None else block.mixer.heads
        results = {} if heads is None else {"mixer_heads": heads.output.input}
        return stream | added | mid | results
    taps = stream | added
    if block.residual_mid is not None:
        taps["residual_mid"] = block.residual_mid
    if block.attention is not None:
        taps |= _attention_taps(block.attention)
    if block.mlp is not None:
        taps |= block.mlp.taps
        taps |= {} if block.mlp.added is None else {"mlp_output": block.mlp.added}
    return taps


def _attention_taps(attention: Attention) -> dict[str, Tap]:
    taps = {
        "attention_input": attention.input,
        "query": attention.query.output,
        "key": attention.key.output,
        **_value_tap(attention),
        "attention_concat": attention.output.input,
        "attention_sum": attention.output.output,
    }
    optional = {
        "gate": None if attention.gate is None else attention.gate.linear.output,
        "attention_output": attention.added,
        "chosen_sources": attention.chosen,
    }
    latent = {} if attention.latent is None else attention.latent.taps
    return taps | latent | {name: tap for name, tap in optional.items() if tap is not None}


def _value_tap(attention: Attention) -> dict[str, Tap]:
    if attention.value_norm is None:
        return {"value": attention.value.output}
    return {"normed_value": attention.value_norm}  # has an axis of heads


_SUMS = frozenset(
    {
        "block_input",
        "attention_sum",
        "attention_output",
        "residual_mid",
        "mlp_sum",
        "mlp_output",
        "block_output",
    }
)


def sum_taps(block: Block | CoarseBlock) -> dict[str, Tap]:
    """Taps of the sums of a block's residual stream, by field name of its activations."""
    taps = layer_taps(block)
    return {n: tap for n, tap in taps.items() if n in _SUMS or n.startswith("sublayer_")}


def sum_gradients(
    block: Block | CoarseBlock, found: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the gradients of a block's sums, from those of the tensors of `sum_taps`."""
    named = {name: gradient.float() for name, gradient in found.items()}
    if isinstance(block, CoarseBlock):
        for i, each in enumerate(block.sublayers):  # those of one node are added to one residual
            named[each.node.name.lower()] = named.pop(f"sublayer_{i}") / each.multiplier
        return named
    for name, finish in _finishes(block):
        if finish is None:
            named[f"{name}_output"] = named.pop(f"{name}_sum")
        elif finish.norm is None:
            named[f"{name}_output"] = named[f"{name}_sum"] / finish.multiplier
    for i, each in enumerate(block.beside):
        named["mixer_output"] = named.pop(f"sublayer_{i}") / each.multiplier
    return named


def _finishes(block: Block) -> list[tuple[str, Finish | None]]:
    """Return what is applied to the results of attention and MLP, by the start of their fields."""
    sublayers = (("attention", block.attention), ("mlp", block.mlp))
    return [(name, found.finish) for name, found in sublayers if found is not None]


def kept_rows(name: str, captured: torch.Tensor, positions: DeviceIndex) -> torch.Tensor:
    """Select the rows of a captured tensor `[pos, features]` that these positions need.

    Attention at a position reads the keys and values of all earlier positions. Of every other
    tensor only the positions themselves are needed. Rows that are not selected are freed.
    """
    captured = _rows_of(name, captured)
    if name not in ("key", "rotated_key", "value", "normed_value", "mapped_key"):
        whole = len(positions.numbers) == len(captured)
        return captured if whole else captured[positions.on(captured.device)]
    part = captured[: positions.numbers[-1] + 1]
    owns_memory = part.untyped_storage().nbytes() == part.numel() * part.element_size()
    return part if owns_memory else part.clone()


def _rows_of(name: str, captured: torch.Tensor) -> torch.Tensor:
    """Flatten a captured tensor to `[pos, features]`; normed values have an axis of heads."""
    return rows(captured.flatten(2) if name == "normed_value" and captured.dim() == 4 else captured)


def stream_activations(
    block: Block | CoarseBlock,
    captured: Mapping[str, torch.Tensor],
    positions: Sequence[int] | None = None,
    replaced: frozenset[str] = frozenset(),
    gradients: Mapping[str, torch.Tensor] | None = None,
) -> StreamActivations:
    """The residual stream around a block, from captured tensors; as `layer_activations`.

    What the sublayers of a block without known parts add is in float32.
    """
    device = captured["block_output"].device
    named = {name: rows(tensor.to(device)) for name, tensor in captured.items()}
    added: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    mid = None
    if isinstance(block, CoarseBlock):
        mid = named.get("residual_mid")
        for i, each in enumerate(block.sublayers):
            terms, name = added[mid is None or each.after_mid], each.node.name.lower()
            vector = named[f"sublayer_{i}"].float() * each.multiplier
            terms[name] = terms[name] + vector if name in terms else vector
    return StreamActivations(
        block_input=named["block_input"],
        block_output=named["block_output"],
        before_mid=added[False],
        after_mid=added[True],
        residual_mid=mid,
        mixer_heads=named.get("mixer_heads"),
        multiplier=block.multiplier if isinstance(block, CoarseBlock) else 1.0,
        kept=None if positions is None else {p: row for row, p in enumerate(positions)},
        gradients={name: found.to(device) for name, found in (gradients or {}).items()},
        replaced=replaced,
    )


def layer_activations(
    block: Block,
    captured: Mapping[str, torch.Tensor],
    length: int,
    positions: Sequence[int] | None = None,
    hidden_sources: HiddenSources | None = None,
    replaced: frozenset[str] = frozenset(),
    gradients: Mapping[str, torch.Tensor] | None = None,
    neuron_change: NeuronChange | None = None,
) -> LayerActivations:
    """A block's activations, from the tensors captured for a prompt of `length` tokens.

    `positions` are those passed to `kept_rows`, None for all. `hidden_sources`, `replaced` and
    `neuron_change` are those of the pass's interventions, `gradients` those of `sum_gradients`. All
    tensors are moved to the device where the block computes, since its input may be on another one.
    """
    attention = block.attention
    device = captured["block_output"].device
    named = {name: tensor.to(device) for name, tensor in captured.items()}
    routing = None
    if isinstance(block.mlp, Experts):  # routing has no batch dimension
        routing = block.mlp.routing(named)
    named = {name.removeprefix("normed_"): _rows_of(name, tensor) for name, tensor in named.items()}
    for name in ("query", "key", "value", "mapped_query", "mapped_key"):
        if name in named and attention is not None:
            heads = attention.n_heads if name.endswith("query") else attention.n_kv_heads
            named[name] = named[name].unflatten(-1, (heads, -1))
    rotation = None
    if attention is not None:
        if attention.latent is not None:
            attention.latent.complete(named)
        if attention.gate is not None:
            named["gate"] = attention.gate(named["gate"], attention.n_heads)
        if attention.rotation is not None:
            rotation = attention.rotation(length).to(device)
    _complete_sums(block, named)
    kept = None if positions is None else {p: row for row, p in enumerate(positions)}
    nothing = torch.empty(0, device=device)
    absent = {} if attention is not None else dict.fromkeys(OF_ATTENTION, nothing)
    absent |= {} if block.mlp is not None else dict.fromkeys(OF_MLP, nothing)
    return LayerActivations(
        routing=routing,
        rotation=rotation,
        kept=kept,
        gradients={name: found.to(device) for name, found in (gradients or {}).items()},
        hidden_sources=hidden_sources,
        replaced=replaced,
        neuron_change=neuron_change,
        **absent,
        **named,
    )


def _complete_sums(block: Block, named: dict[str, torch.Tensor]) -> None:
    """Replace captured results by what is added to the residual, by field name."""
    if "shared_sum" in named:
        named["mlp_sum"] = named["mlp_sum"] + named.pop("shared_sum")
    for name, finish in _finishes(block):
        if finish is None:
            named[f"{name}_output"] = named.pop(f"{name}_sum")
        elif finish.norm is None:
            named[f"{name}_output"] = named[f"{name}_sum"] * finish.multiplier
    beside = [
        named.pop(f"sublayer_{i}").float() * each.multiplier for i, each in enumerate(block.beside)
    ]
    if beside:
        named["mixer_output"] = torch.stack(beside).sum(0)

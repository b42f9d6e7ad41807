"""Find the linear maps of blocks, and the sublayers of blocks without known parts.

The sublayers are the modules whose outputs make up what a block adds. Names decide only the kind of
a mixer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from januslens_server.capture import End, Tap
from januslens_server.capture.hooks import nth_tensor, rows
from januslens_server.models.adapters.observed_pass import (
    difference,
    is_norm,
    observed_ids,
)
from januslens_server.models.adapters.observed_sum import (
    SUM,
    BlockCall,
    Terms,
    equal,
    observing,
    skip_path,
    terms_of_block,
)
from januslens_server.models.matrices import Linear, LoraConv1D, LoraLinear, ModuleMap
from januslens_server.models.vetting import check_facts
from januslens_server.models.views import Block, CoarseBlock, MixerHeads, ModelView, Sublayer
from januslens_server.results import Side, SublayerKind

# Maximum effect of another position on a position-wise module, relative to its largest output.
ELSEWHERE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

NOT_FOUND = "no outputs of its modules add up to what the block adds"

# Kinds of mixers whose parts are not known, as a reason names them.
UNKNOWN_MIXERS = {
    SublayerKind.STATE_SPACE: "a state space",
    SublayerKind.LINEAR_ATTENTION: "linear attention",
    SublayerKind.CONVOLUTION: "a convolution",
}

# Starts of words in the names of mixers' classes, in lower case. The first that occurs gives the
# kind.
MIXERS = (
    ("mamba", SublayerKind.STATE_SPACE),
    ("ssm", SublayerKind.STATE_SPACE),
    ("delta", SublayerKind.LINEAR_ATTENTION),
    ("linear", SublayerKind.LINEAR_ATTENTION),
    ("lightning", SublayerKind.LINEAR_ATTENTION),
    ("retention", SublayerKind.LINEAR_ATTENTION),
    ("rwkv", SublayerKind.LINEAR_ATTENTION),
    ("conv", SublayerKind.CONVOLUTION),
    ("attention", SublayerKind.ATTENTION),
    ("mla", SublayerKind.ATTENTION),
)

# Attributes of a mixer for the number of its heads, and for the width of a head's result.
HEAD_COUNTS = ("num_v_heads", "num_heads", "num_attention_heads")
HEAD_WIDTHS = ("head_v_dim", "head_dim")


# Classes of modules that compute their linear map and nothing else.
LINEAR = {nn.Linear, Conv1D, LoraLinear, LoraConv1D}


@dataclass(frozen=True)
class _Found:
    """What a pass shows of a block.

    These are its sublayers, the residual that the last of them read, if it is not the input, its
    multiplier, and its linear maps by name. There are no sublayers if none add up; `skips` says why
    if the skip path carries something else than the block's input.
    """

    skips: str
    sublayers: tuple[Sublayer, ...]
    residual_mid: Tap | None
    multiplier: float
    maps: dict[str, ModuleMap]


def with_modules(
    network: PreTrainedModel, view: ModelView, layers: Collection[int] | None = None
) -> ModelView:
    """Return a view with the linear maps of all blocks, and the sublayers of some.

    These are the blocks without known parts among the `layers`, by default all. The reason of those
    that have no sublayers says so. Of those that mix positions without attention, it is the mixer;
    `layers` keep theirs. A block that does not add its sublayers to its input has no parts. Raises
    `ModelFailed` if the model's facts are impossible.
    """
    check_facts(view.facts)
    found = _observed(network, view)
    view = view.coarsened({i: found[i].skips for i in view.known if i in found and found[i].skips})
    blocks = list(view.blocks)
    for layer, block in enumerate(blocks):
        if layer not in found:
            continue
        maps = found[layer].maps
        if isinstance(block, Block) or (layers is not None and layer not in layers):
            blocks[layer] = replace(block, maps=maps)
            continue
        seen = found[layer]
        reason = block.reason
        if not seen.sublayers and seen.skips != reason and view.facts.n_streams == 1:
            reason = f"{seen.skips}; {reason}" if seen.skips else f"{reason}; {NOT_FOUND}"
        if layers is None:
            reason = _unknown_mixer(seen.sublayers) or reason
        blocks[layer] = CoarseBlock(
            block.module, reason, seen.sublayers, seen.residual_mid, seen.multiplier, maps
        )
    return replace(view, blocks=tuple(blocks))


def _unknown_mixer(sublayers: Sequence[Sublayer]) -> str:
    """Say which sublayer is a mixer of another kind than attention; empty beside attention."""
    if any(each.kind is SublayerKind.ATTENTION for each in sublayers):
        return ""
    reasons = (
        f"{each.name} is {UNKNOWN_MIXERS[each.kind]}: only the parts of attention and MLP are known"
        for each in sublayers
        if each.kind in UNKNOWN_MIXERS
    )
    return next(reasons, "")


@torch.no_grad()
def _observed(network: PreTrainedModel, view: ModelView) -> dict[int, _Found]:
    """Run a short prompt; return what it shows of each block, by layer."""
    found: dict[int, _Found] = {}
    config = network.config.get_text_config()
    owners = Counter(id(weight) for module in network.modules() for weight in _weights(module))
    shared = {weight for weight, count in owners.items() if count > 1}
    with ExitStack() as hooks:
        for layer, block in enumerate(view.blocks):

            def ended(calls: Sequence[BlockCall], whole: BlockCall, layer: int = layer) -> None:
                terms, multiplier = terms_of_block(calls, whole, config)
                coarse = isinstance(view.blocks[layer], CoarseBlock)
                sublayers, mid = _sublayers(calls, whole, terms) if coarse else ((), None)
                basis = _residual_basis(calls, whole, terms, view.facts.n_streams)
                maps = _linear_maps(calls, whole, basis, shared)
                multiplier = multiplier if sublayers else 1.0
                skips = "" if terms else skip_path(calls, whole)
                found[layer] = _Found(skips, sublayers, mid, multiplier, maps)

            hooks.enter_context(observing(block.module, ended))
        network(input_ids=observed_ids(network), use_cache=False)
    return found


def _weights(module: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters(recurse=False) if name == "weight"]


def _sublayers(
    calls: Sequence[BlockCall], block: BlockCall, terms: Terms
) -> tuple[tuple[Sublayer, ...], Tap | None]:
    """Return a block's sublayers, and the tap of the residual that the last of them read.

    Sublayers of one kind of node have the same id, so they are on one side of this residual.
    """
    sublayers = [
        Sublayer(
            name=_source(call, calls).name,
            kind=_kind(_source(call, calls)),
            output=Tap(call.module, End.OUTPUT, overwritten=call.overwritten),
            multiplier=factor,
            heads=_heads(call, calls),
        )
        for call, factor in terms
    ]
    nodes = [each.node for each in sublayers]
    split = [i for i in range(1, len(nodes)) if {*nodes[:i]}.isdisjoint(nodes[i:])]
    before_mid, residual_mid = _residual_mid(calls, block, terms, split)
    late = (replace(each, after_mid=i >= before_mid) for i, each in enumerate(sublayers))
    return tuple(late), residual_mid


def _heads(mixer: BlockCall, calls: Sequence[BlockCall]) -> MixerHeads | None:
    """Map the heads of linear attention or a state space.

    The mixer's attributes have their number and width. It must return what its output map gives.
    """
    module: Any = _mixer(mixer.module)
    if kind_of_mixer(module) not in UNKNOWN_MIXERS:
        return None
    inside = set(module.modules())
    count, width = (
        next((getattr(module, name) for name in names if hasattr(module, name)), 0)
        for names in (HEAD_COUNTS, HEAD_WIDTHS)
    )
    for call in reversed(calls):
        if call.module not in inside or not isinstance(call.module, nn.Linear | Conv1D):
            continue
        output = Linear(call.module, isinstance(call.module, Conv1D), overwritten=call.overwritten)
        if not count or output.d_in != count * width or not equal(call.output, mixer.output):
            continue
        if _computes(output, call):
            return MixerHeads(output, count)
    return None


def _computes(linear: Linear, call: BlockCall) -> bool:
    """Whether a call returns what its linear map gives."""
    found = rows(call.input).float() @ linear.weight.float()
    if linear.bias is not None:
        found = found + linear.bias.float()
    return difference(found, rows(call.output)) <= SUM[call.output.dtype]


class _ResidualBasis(NamedTuple):
    """Tensors of a block in the residual basis.

    `states` are the residual stream and what norms of it return, and `added` what sublayers add.
    """

    states: list[torch.Tensor]
    added: list[torch.Tensor]


def _residual_basis(
    calls: Sequence[BlockCall], block: BlockCall, terms: Terms, streams: int
) -> _ResidualBasis:
    """Return the tensors of a block in the residual basis."""
    if streams > 1:
        return _mixed_basis(calls, block, streams)
    states = [block.input, *(_after(block, terms[:count]) for count in range(1, len(terms)))]
    norms = [call for call in calls if is_norm(call.module)]
    states += [
        call.output for call in norms if any(is_multiple(call.input, each) for each in states)
    ]
    added = [call.output for call, _ in terms]
    added += [_source(call, calls).output for call, _ in terms]
    return _ResidualBasis(states, added)


def _mixed_basis(calls: Sequence[BlockCall], block: BlockCall, streams: int) -> _ResidualBasis:
    """Return the same for a block that mixes several residual streams.

    It is measured at each position: a norm reads the residual stream if its input is a combination
    of the block's input streams and of what its children return, but not one child's result. A
    child adds to the residual stream if the block's output streams are no such combination without
    it.
    """
    length, tolerance = block.input.shape[-2], SUM[block.output.dtype]
    before, after = (
        whole.float().reshape(length, streams, -1) for whole in (block.input, block.output)
    )
    size = before[:, 0].shape
    children = [
        call for call in calls if "." not in call.name and call.output.numel() == size.numel()
    ]
    if 2 * (streams + len(children)) > size[1]:  # any vector would be a combination
        return _ResidualBasis([], [])

    def combined(vectors: torch.Tensor, others: Sequence[BlockCall]) -> bool:
        returned = [call.output.float().reshape(length, 1, -1) for call in others]
        parts = torch.cat([before, *returned], dim=1).double()
        wanted = vectors.double().reshape(length, -1, size[1])
        parts = parts / parts.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        weights = wanted @ torch.linalg.pinv(parts)  # streams may be equal: no unique solution
        return difference(weights @ parts, wanted) <= tolerance

    norms = [call for call in calls if is_norm(call.module) and call.input.numel() == size.numel()]
    behind = [c for c in norms if any(is_multiple(c.input, each.output) for each in children)]
    reading = [c for c in norms if c not in behind and combined(c.input, children)]
    others = [call for call in children if call not in reading]
    adding = [
        call
        for call in (others if combined(after, others) else [])
        if not combined(after, [each for each in others if each is not call])
    ]
    added = [call.output for call in adding]
    return _ResidualBasis(
        [call.output for call in reading],
        added + [_source(call, calls).output for call in adding],
    )


def _linear_maps(
    calls: Sequence[BlockCall], block: BlockCall, basis: _ResidualBasis, shared: Collection[int]
) -> dict[str, ModuleMap]:
    """Return the linear maps that a pass calls once with every position, by name.

    The input of a map is in the residual basis if it is a multiple of the residual stream, or of
    what a norm of it returns; the output if it is a multiple of a sublayer's. Maps whose weight is
    in `shared` have more than one module. A module whose class computes something else from its
    linear map, such as the router of Llama 4, is none.
    """
    positions, found = block.input.shape[-2], {}
    for call in calls:
        if not isinstance(call.module, nn.Linear | Conv1D) or _EXPERT.search(call.name):
            continue
        once = sum(call.module is each.module for each in calls) == 1
        whole = all(t.flatten(0, -2).shape[0] == positions for t in (call.input, call.output))
        if not once or not whole or id(call.module.weight) in shared:
            continue
        side = None
        if any(is_multiple(call.input, state) for state in basis.states):
            side = Side.INPUT
        elif any(is_multiple(call.output, each) for each in basis.added):
            side = Side.VJP
        linear = Linear(call.module, isinstance(call.module, Conv1D), overwritten=call.overwritten)
        if type(call.module) not in LINEAR and not _computes(linear, call):
            continue
        found[call.name] = ModuleMap(linear, side)
    return found


# The name of a module in one of several experts, which gets the positions routed to it.
_EXPERT = re.compile(r"(^|\.)\w*experts\.\d+\.")


def is_multiple(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a tensor is another one times a number, apart from its shape and rounding."""
    if one.shape[-1] != other.shape[-1] or one.numel() != other.numel():
        return False
    a, b = one.double().flatten(), other.double().flatten().to(one.device)
    factor = (a @ b) / (b @ b).clamp(min=1e-30)
    return bool(factor != 0) and difference(factor * b, a) <= SUM[other.dtype]


def _residual_mid(
    calls: Sequence[BlockCall], block: BlockCall, terms: Terms, counts: Sequence[int]
) -> tuple[int, Tap | None]:
    """Return the number of terms before the residual that the last ones read, and its tap.

    It is the largest of `counts` after which a module reads the sum. Without one, it is the number
    of all terms, which read the block's input.
    """
    for count in reversed(counts):
        middle = _after(block, terms[:count])
        for call in calls:
            same = call.input.shape == middle.shape and call.input.is_floating_point()
            if same and difference(call.input, middle) <= SUM[block.output.dtype]:
                return count, Tap(call.module, End.INPUT)
    return len(terms), None


def _after(block: BlockCall, terms: Terms) -> torch.Tensor:
    """Return a block's input plus some terms, in float32."""
    residual = block.input.float()
    for call, factor in terms:
        residual = residual + factor * call.output.float().reshape(residual.shape)
    return residual


def _source(call: BlockCall, calls: Sequence[BlockCall]) -> BlockCall:
    """Return the call whose output a norm reads, for a norm behind a sublayer; else the call."""
    if not is_norm(call.module):
        return call
    giving = [other for other in calls if equal(other.output, call.input)]
    return giving[-1] if giving else call


def _kind(call: BlockCall) -> SublayerKind:
    """Return what a sublayer is: an MLP if each position depends on itself alone, else by name.

    Attention to the keys of another layer (Gemma 4) is the exception: its name says what it is.
    """
    mixer = _mixer(call.module)
    attends = "attention" in type(mixer).__name__.lower()
    if not attends and _is_positionwise(call):
        names = (own.lower() for own, _ in call.module.named_modules())
        experts = any("expert" in own for own in names)
        return SublayerKind.EXPERTS if experts else SublayerKind.MLP
    return kind_of_mixer(mixer)


def kind_of_mixer(module: nn.Module) -> SublayerKind:
    """Return what mixes positions in a module, by its parameters or its class; else OTHER."""
    if {"A_log", "D"} <= {name for name, _ in module.named_parameters(recurse=False)}:
        return SublayerKind.STATE_SPACE
    words = [word.lower() for word in _WORDS.findall(type(module).__name__)]
    named = (kind for start, kind in MIXERS for word in words if word.startswith(start))
    return next(named, SublayerKind.OTHER)


# A word in the name of a class, so that SeedOssMLP is no SSM.
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*")


def _mixer(module: nn.Module) -> nn.Module:
    """Return the module itself, or the only child with parameters of a wrapper."""
    owners = [child for child in module.children() if list(child.parameters())]
    known = kind_of_mixer(module) is not SublayerKind.OTHER
    return _mixer(owners[0]) if len(owners) == 1 and not known else module


def _is_positionwise(call: BlockCall) -> bool:
    """Whether a change of the first position's input leaves the outputs of all others."""
    args, named = call.arguments
    changed = call.input.clone()
    rows = changed.flatten(0, -2)  # some modules have no batch axis
    rows[0] = -rows[0].flip(-1)
    whole = nth_tensor(args, named)
    again = call.module(
        *(changed if value is whole else value for value in args),
        **{name: changed if value is whole else value for name, value in named.items()},
    )
    found = nth_tensor(again).flatten(0, -2)[1:].float()
    expected = call.output.flatten(0, -2)[1:].float()
    return difference(found, expected) <= ELSEWHERE[call.output.dtype]

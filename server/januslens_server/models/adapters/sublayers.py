"""Find what each block adds to the residual stream: the sublayers of blocks without known parts.

Nothing is read from names but the kind of a mixer. In one forward pass, the difference between a
block's output and its input is solved for the outputs of the modules in the block. The modules
that make it up, each with a factor of 1 or one that the configuration names, are its sublayers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.capture.hooks import nth_tensor
from januslens_server.models.adapters.observed_pass import (
    difference,
    is_norm,
    observed_ids,
    scales,
)
from januslens_server.models.views import CoarseBlock, ModelView, Sublayer
from januslens_server.results import SublayerKind

# Maximum difference between a solved factor and one of the configuration, relative to it; and
# between sums, relative to the residual stream.
FACTOR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SUM = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Maximum effect of another position on a position-wise module, relative to its largest output.
ELSEWHERE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

NOT_FOUND = "no outputs of its modules add up to what the block adds"

# Words in the names of mixers' classes, in lower case. The first that occurs gives the kind.
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
)


@dataclass
class _Call:
    """A call of a module, with copies of its first input and output tensor `[batch, pos, width]`.

    `arguments` are those of the call. `output_is` is the output itself.
    """

    name: str
    module: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    input: torch.Tensor
    output: torch.Tensor
    output_is: torch.Tensor


def with_sublayers(
    network: PreTrainedModel, view: ModelView, layers: Collection[int] | None = None
) -> ModelView:
    """Return a view with the sublayers of those blocks without known parts that have some.

    `layers` restricts the search; None means all. The reason of other such blocks names what was
    not found.
    """
    wanted = [
        layer
        for layer, block in enumerate(view.blocks)
        if isinstance(block, CoarseBlock) and (layers is None or layer in layers)
    ]
    if not wanted:
        return view
    found = _observed(network, {layer: view.blocks[layer].module for layer in wanted})
    blocks = list(view.blocks)
    for layer in wanted:
        reason = view.level(layer).reason
        module = blocks[layer].module
        blocks[layer] = (
            CoarseBlock(module, reason, *found[layer])
            if layer in found
            else CoarseBlock(module, f"{reason}; {NOT_FOUND}")
        )
    return replace(view, blocks=tuple(blocks))


# The sublayers of a block, and the residual that the last of them read, if it is not the input.
_Found = tuple[tuple[Sublayer, ...], Tap | None]


@torch.no_grad()
def _observed(network: PreTrainedModel, blocks: dict[int, nn.Module]) -> dict[int, _Found]:
    """Run a short prompt; return the sublayers of the layers that have some."""
    found: dict[int, _Found] = {}
    config = network.config.get_text_config()
    with ExitStack() as hooks:
        for layer, block in blocks.items():
            hooks.enter_context(_observing(layer, block, config, found))
        network(input_ids=observed_ids(network), use_cache=False)
    return found


def _observing(
    layer: int, block: nn.Module, config: PreTrainedConfig, found: dict[int, _Found]
) -> ExitStack:
    """Observe the calls inside a block; at its end, add its sublayers to `found`."""
    calls: list[_Call] = []
    begun: dict[nn.Module, torch.Tensor] = {}
    names = {module: name for name, module in block.named_modules()}

    def before(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        if any(isinstance(value, torch.Tensor) for value in (*args, *named.values())):
            begun[module] = nth_tensor(args, named).clone()

    def after(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
        if module not in begun:
            return
        values = output if isinstance(output, tuple | list) else (output,)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        taken = begun.pop(module)
        if tensors:
            calls.append(
                _Call(names[module], module, (args, named), taken, tensors[0].clone(), tensors[0])
            )

    stack = ExitStack()

    def ended(_module: nn.Module, _args: Any, _named: Any, _output: Any) -> None:
        stack.close()  # before modules are called again to see which mix positions
        if calls and calls[-1].module is block:
            sublayers = _sublayers(calls[:-1], calls[-1], config)
            if sublayers is not None:
                found[layer] = sublayers
        calls.clear()

    for module in block.modules():
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(handle.remove)
        handle = module.register_forward_hook(after, with_kwargs=True)
        stack.callback(handle.remove)
    handle = block.register_forward_hook(ended, with_kwargs=True)
    stack.callback(handle.remove)
    return stack


def _sublayers(calls: Sequence[_Call], block: _Call, config: PreTrainedConfig) -> _Found | None:
    """Return a block's sublayers, or None if they were not found."""
    once = [call for call in calls if sum(call.module is each.module for each in calls) == 1]
    for depth in (1, 2):
        terms = _terms(_candidates(once, block, depth), block, config)
        if terms is None:
            continue
        after_mid, residual_mid = _residual_mid(calls, block, terms)
        sublayers = tuple(
            Sublayer(
                name=_source(call, calls).name,
                kind=_kind(_source(call, calls)),
                output=Tap(
                    call.module,
                    End.OUTPUT,
                    overwritten=not torch.equal(call.output, call.output_is),
                ),
                multiplier=factor,
                after_mid=i >= after_mid,
            )
            for i, (call, factor) in enumerate(terms)
        )
        before, behind = (
            {each.node for each in sublayers if each.after_mid is late} for late in (False, True)
        )
        if before & behind:  # their nodes would have the same ids
            return None
        return sublayers, residual_mid
    return None


def _candidates(calls: Sequence[_Call], block: _Call, depth: int) -> list[_Call]:
    """Return the calls of modules at a `depth` that may be sublayers, without equal outputs."""
    found: list[_Call] = []
    for call in calls:
        wide = call.output.shape == block.output.shape and call.output.is_floating_point()
        if not wide or not 1 <= call.name.count(".") + 1 <= depth or call.output.eq(0).all():
            continue
        if not any(_equal(call.output, other.output) for other in (*found, block)):
            found.append(call)
    return found


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def _terms(
    candidates: Sequence[_Call], block: _Call, config: PreTrainedConfig
) -> list[tuple[_Call, float]] | None:
    """Solve what a block adds for outputs of modules; return these with their factors, or None."""
    if not candidates:
        return None
    added = (block.output.double() - block.input.double()).flatten().cpu()
    columns = torch.stack([call.output.double().flatten().cpu() for call in candidates], dim=1)
    sizes = columns.norm(dim=0)
    solved = torch.linalg.lstsq(columns / sizes, added[:, None]).solution[:, 0] / sizes
    data_type = block.output.dtype
    terms: list[tuple[_Call, float]] = []
    rest = added
    for i, (call, factor) in enumerate(zip(candidates, solved.tolist(), strict=True)):
        near = min(_factors(config), key=lambda known: abs(known - factor))
        if abs(near - factor) <= FACTOR[data_type] * near:
            terms.append((call, near))
            rest = rest - near * columns[:, i]
    stream = max(float(block.input.double().norm()), float(block.output.double().norm()))
    bound = min(SUM[data_type] * stream, 0.1 * float(added.norm()))
    return terms if terms and float(rest.norm()) <= bound else None


def _factors(config: PreTrainedConfig) -> list[float]:
    """List the factors that the configuration may give a sublayer's output."""
    named = scales(config)
    depth = getattr(config, "scale_depth", None)
    return named if depth is None else [*named, depth / config.num_hidden_layers**0.5]


def _residual_mid(
    calls: Sequence[_Call], block: _Call, terms: Sequence[tuple[_Call, float]]
) -> tuple[int, Tap | None]:
    """Return the number of terms before the residual that the last ones read, and its tap.

    Without such a residual, the number is that of all terms, which read the block's input.
    """
    for count in range(len(terms) - 1, 0, -1):
        middle = block.input.float() + sum(
            factor * call.output.float() for call, factor in terms[:count]
        )
        for call in calls:
            same = call.input.shape == middle.shape and call.input.is_floating_point()
            if same and difference(call.input, middle) <= SUM[block.output.dtype]:
                return count, Tap(call.module, End.INPUT)
    return len(terms), None


def _source(call: _Call, calls: Sequence[_Call]) -> _Call:
    """Return the call whose output a norm reads, for a norm behind a sublayer; else the call."""
    if not is_norm(call.module):
        return call
    giving = [other for other in calls if _equal(other.output, call.input)]
    return giving[-1] if giving else call


def _kind(call: _Call) -> SublayerKind:
    """Return what a sublayer is: an MLP if each position depends on itself alone, else by name."""
    if _is_positionwise(call):
        names = (name.lower() for name, _ in call.module.named_modules())
        experts = any("expert" in name for name in names)
        return SublayerKind.EXPERTS if experts else SublayerKind.MLP
    mixer = _mixer(call.module)
    if {"A_log", "D"} <= {name for name, _ in mixer.named_parameters(recurse=False)}:
        return SublayerKind.STATE_SPACE
    name = type(mixer).__name__.lower()
    return next((kind for word, kind in MIXERS if word in name), SublayerKind.OTHER)


def _mixer(module: nn.Module) -> nn.Module:
    """Return the module itself, or the only child with parameters of a wrapper."""
    owners = [child for child in module.children() if list(child.parameters())]
    known = any(word in type(module).__name__.lower() for word, _ in MIXERS)
    return _mixer(owners[0]) if len(owners) == 1 and not known else module


def _is_positionwise(call: _Call) -> bool:
    """Whether a change of the first position's input leaves the outputs of all others."""
    args, named = call.arguments
    changed = call.input.clone()
    changed[:, 0] = -changed[:, 0].flip(-1)
    whole = nth_tensor(args, named)
    again = call.module(
        *(changed if value is whole else value for value in args),
        **{name: changed if value is whole else value for name, value in named.items()},
    )
    found = nth_tensor(again)[:, 1:].float()
    expected = call.output[:, 1:].float()
    return difference(found, expected) <= ELSEWHERE[call.output.dtype]

"""Solve what a block returns for the outputs of its modules.

A block of a residual stream returns its input plus what its sublayers add. In one forward pass, the
difference between its output and its input is solved for the outputs of its modules, each with a
factor of 1 or one that the configuration names. If there is no solution, the skip path may carry
something else than the input, such as the result of a norm; then the reason says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from januslens_server.capture.hooks import nth_tensor
from januslens_server.models.adapters.observed_pass import is_norm, scales, solved_factors
from januslens_server.models.matrices import read_parameter

# Maximum difference between a solved factor and one of the configuration, relative to it; and
# between sums, relative to the residual stream.
FACTOR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SUM = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class BlockCall:
    """A call of a module, with copies of its first input and output tensor `[batch, pos, width]`.

    `arguments` are those of the call. `output_is` is the output itself.
    """

    name: str
    module: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    input: torch.Tensor
    output: torch.Tensor
    output_is: torch.Tensor

    @property
    def overwritten(self) -> bool:
        """Whether the model changed the output in place, once its block has ended."""
        return not torch.equal(self.output, self.output_is)


def observing(
    block: nn.Module, observed: Callable[[Sequence[BlockCall], BlockCall], None]
) -> ExitStack:
    """Observe the calls inside a block; at its end, pass them and its own call to `observed`."""
    calls: list[BlockCall] = []
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
                BlockCall(
                    names[module], module, (args, named), taken, tensors[0].clone(), tensors[0]
                )
            )

    stack = ExitStack()

    def ended(_module: nn.Module, _args: Any, _named: Any, _output: Any) -> None:
        stack.close()  # before modules are called again to see which mix positions
        if calls and calls[-1].module is block:
            observed(calls[:-1], calls[-1])
        calls.clear()

    for module in block.modules():
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(handle.remove)
        handle = module.register_forward_hook(after, with_kwargs=True)
        stack.callback(handle.remove)
    handle = block.register_forward_hook(ended, with_kwargs=True)
    stack.callback(handle.remove)
    return stack


# Calls of modules that make up what a block adds, with the factors of their outputs.
Terms = list[tuple[BlockCall, float]]


def terms_of_block(
    calls: Sequence[BlockCall], block: BlockCall, config: PreTrainedConfig
) -> tuple[Terms, float]:
    """Return what makes up what a block adds, empty if it was not found, and its multiplier."""
    once = [call for call in calls if sum(call.module is each.module for each in calls) == 1]
    for depth, multiplier in product((1, 2), multipliers(block.module)):
        terms = _terms(_candidates(once, block, depth), block, config, multiplier)
        if terms:
            return terms, multiplier
    return [], 1.0


def multipliers(block: nn.Module) -> list[float]:
    """List what may multiply the sum that a block returns: 1, and numbers among its tensors."""
    own = (*block.buffers(recurse=False), *block.parameters(recurse=False))
    numbers = [float(tensor) for tensor in own if tensor.numel() == 1]
    return list(dict.fromkeys([1.0, *(number for number in numbers if number)]))


def _candidates(calls: Sequence[BlockCall], block: BlockCall, depth: int) -> list[BlockCall]:
    """Return the calls of modules at a `depth` that may be sublayers, without equal outputs."""
    found: list[BlockCall] = []
    for call in calls:
        if call.output.dim() < 2:
            continue
        flat = call.output.flatten(0, -2)  # some modules have no batch axis
        if flat.shape != block.output.flatten(0, -2).shape or not flat.is_floating_point():
            continue
        if not 1 <= call.name.count(".") + 1 <= depth or flat.eq(0).all():
            continue
        if not any(equal(call.output, other.output) for other in (*found, block)):
            found.append(call)
    return found


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are equal apart from a batch axis."""
    one, other = one.flatten(0, -2), other.flatten(0, -2)
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def _terms(
    candidates: Sequence[BlockCall], block: BlockCall, config: PreTrainedConfig, multiplier: float
) -> Terms:
    """Solve what a block adds for outputs of modules; return these with their factors, if any.

    The block's output is `multiplier` times its input and what it adds.
    """
    if not candidates:
        return []
    added = (block.output.double() / multiplier - block.input.double()).flatten().cpu()
    columns = torch.stack([call.output.double().flatten().cpu() for call in candidates], dim=1)
    if not (added.isfinite().all() and columns.isfinite().all()):  # the self-check says why
        return []
    data_type = block.output.dtype
    terms: Terms = []
    rest = added
    factors = solved_factors(added, columns, _factors(config), FACTOR[data_type])
    for i, (call, factor) in enumerate(zip(candidates, factors, strict=True)):
        if factor is not None:
            terms.append((call, factor))
            rest = rest - factor * columns[:, i]
    sizes_of = (float(each.double().norm()) for each in (block.input, block.output / multiplier))
    stream = max(sizes_of)
    bound = min(SUM[data_type] * stream, 0.1 * float(added.norm()))
    return terms if float(rest.norm()) <= bound else []


def _factors(config: PreTrainedConfig) -> list[float]:
    """List the factors that the configuration may give a sublayer's output."""
    named = scales(config)
    depth = getattr(config, "scale_depth", None)
    return named if depth is None else [*named, depth / config.num_hidden_layers**0.5]


# Condition number beyond which summands are too much alike to tell their factors.
ALIKE = 1e3
# What follows if a block does not add its sublayers to its input.
NO_SUM = "the residual stream is not a sum of what blocks add"


def skip_path(calls: Sequence[BlockCall], block: BlockCall) -> str:
    """Say what a block adds its sublayers to, if that is not its input; empty if it was not found.

    Such a block returns the result of a norm (post-norms), continues from that of a norm (MiniMax),
    or multiplies its input, by a number or by some of its parameters (Doge).
    """
    ends = (call for call in reversed(calls) if is_norm(call.module))
    last = next((call for call in ends if equal(call.output, block.output)), None)
    if last is not None:
        return f"the block returns the result of {last.name}, a norm of the sum: {NO_SUM}"
    once = [call for call in calls if sum(call.module is each.module for each in calls) == 1]
    for depth in (1, 2):
        summands = _summands(_candidates(once, block, depth), block)
        carried = [each for each in summands if each.call is None]
        normed = [each for each in summands if each.call is not None and is_norm(each.call.module)]
        if len(carried) == 1 and carried[0].factors(block):
            return f"the block multiplies its input by {carried[0].factors(block)}: {NO_SUM}"
        if normed and not carried:
            return (
                f"the block adds its sublayers to the result of {normed[-1]}, a norm, instead of "
                f"to its input: {NO_SUM}"
            )
    return ""


@dataclass(frozen=True)
class _Summand:
    """A summand of what a block returns: a call's output, or the block's input if it is None.

    It is multiplied by the block's parameters named `by` and by `factor`.
    """

    call: BlockCall | None
    by: tuple[str, ...]
    factor: float = 1.0

    def factors(self, block: BlockCall) -> str:
        """Name what multiplies it; empty if nothing does."""
        number = [f"{self.factor:.3g}"] if abs(self.factor - 1) > FACTOR[block.output.dtype] else []
        return " and ".join([*number, *self.by])

    def __str__(self) -> str:
        """Name the module that returns it."""
        return "" if self.call is None else self.call.name

    def vectors(self, block: BlockCall) -> torch.Tensor:
        """Return the summand before `factor`, flattened, in float64 on the host."""
        vectors = (block.input if self.call is None else self.call.output).double().cpu()
        for name in self.by:
            vectors = vectors * read_parameter(block.module, name).double().flatten().cpu()
        return vectors.flatten()


def _summands(candidates: Sequence[BlockCall], block: BlockCall) -> list[_Summand]:
    """Solve what a block returns for its input and the outputs of modules.

    Each may be multiplied by up to two of the block's own parameters `[d_model]`. The result is
    empty if there is no solution, more than one, or one with the input itself.
    """
    own = dict(block.module.named_parameters(recurse=False))
    names = [name for name, p in own.items() if p.numel() == block.input.shape[-1]]
    products = [chosen for count in range(3) for chosen in combinations(names, count)]
    terms = [_Summand(call, by) for call, by in product((None, *candidates), products)]
    whole = block.output.double().flatten().cpu()
    columns = torch.stack([term.vectors(block) for term in terms], dim=1)
    if not (whole.isfinite().all() and columns.isfinite().all()):  # the self-check says why
        return []
    data_type = block.output.dtype
    bound = SUM[data_type] * float(whole.norm())
    plain = [i for i, term in enumerate(terms) if term.call is not None and not term.by]
    if float(_solved(columns[:, plain], whole - columns[:, 0])[1].norm()) <= bound:
        return []
    for _ in range(2):  # again, for those that have a part in it
        factors, rest = _solved(columns, whole)
        parts = factors * columns.norm(dim=0)
        used = (parts.abs() > FACTOR[data_type] * whole.norm()).nonzero().flatten().tolist()
        solution = [replace(terms[i], factor=float(factors[i])) for i in used]
        terms, columns = [terms[i] for i in used], columns[:, used]
    unique = bool(used) and float(torch.linalg.cond(_unit(columns))) < ALIKE
    return solution if unique and float(rest.norm()) <= bound else []


def _solved(columns: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve `columns factors = whole` by least squares; return the factors and what is left."""
    if not columns.shape[1]:
        return columns.new_zeros(0), whole
    solved = torch.linalg.lstsq(_unit(columns), whole, driver="gelsd").solution
    factors = solved / columns.norm(dim=0).clamp(min=1e-30)
    return factors, whole - columns @ factors


def _unit(columns: torch.Tensor) -> torch.Tensor:
    """Return columns of norm 1; those of norm 0 stay 0."""
    unit: torch.Tensor = columns / columns.norm(dim=0).clamp(min=1e-30)
    return unit

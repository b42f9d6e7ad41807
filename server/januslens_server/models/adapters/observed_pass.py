"""Record the calls of modules in one forward pass; recognise norms by their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from januslens_server.errors import ModelFailed
from januslens_server.lens.norm import Norm

# Tokens of the observed forward pass.
OBSERVED_LENGTH = 6

# Maximum relative difference between a norm module's output and the formula's.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, with its first input and output tensor, `[batch, pos, ...]`.

    `given` is a copy of the output, made at the time. `tensors` are all tensors among the
    arguments.
    """

    name: str
    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor
    given: torch.Tensor
    tensors: tuple[torch.Tensor, ...] = ()

    @property
    def overwritten(self) -> bool:
        """Whether the model changed the output in place after the call."""
        return not torch.equal(self.output, self.given)


@dataclass(frozen=True)
class Choice:
    """What an indexer chose: positions of sources `[batch, pos, k]`, as integers."""

    name: str
    module: nn.Module
    output: torch.Tensor


@dataclass(frozen=True)
class ObservedPass:
    """The calls of all modules in one forward pass, in the order in which they returned.

    `choices` are those of modules that return integers.
    """

    calls: tuple[ModuleCall, ...]
    choices: tuple[Choice, ...] = ()

    def inside(self, prefix: str) -> list[ModuleCall]:
        """Return the calls of the modules inside the one named `prefix`."""
        return [call for call in self.calls if call.name.startswith(f"{prefix}.")]

    def of(self, module: nn.Module) -> ModuleCall | None:
        """Return the call of a module, or None."""
        return next((call for call in self.calls if call.module is module), None)


def observed_ids(network: PreTrainedModel) -> torch.Tensor:
    """Token ids `[1, pos]` spread evenly over the vocabulary."""
    vocab_size = network.get_input_embeddings().get_parameter("weight").shape[0]
    device = network.device if network.device.type != "meta" else None  # accelerate moves ids
    steps = torch.arange(OBSERVED_LENGTH, device=device)
    return (steps * max(1, vocab_size // OBSERVED_LENGTH) % vocab_size)[None]


@torch.inference_mode()
def observe(network: PreTrainedModel) -> ObservedPass:
    """Run `observed_ids` through the model and record the call of every module."""
    calls: list[ModuleCall] = []
    choices: list[Choice] = []
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            record = _recorder(name, calls, choices)
            hooks.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        network(input_ids=observed_ids(network), use_cache=False)
    return ObservedPass(tuple(calls), tuple(choices))


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors share memory, which shows that one module's output is another's input."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _recorder(name: str, calls: list[ModuleCall], choices: list[Choice]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
        integers = isinstance(output, torch.Tensor) and output.dtype in {torch.int32, torch.int64}
        if integers and output.dim() == 3:
            choices.append(Choice(name, module, output))
        passed = (*args, *named.values())
        taken = _first_float(passed)
        given = _first_float(output if isinstance(output, tuple | list) else [output])
        if taken is not None and given is not None:
            tensors = tuple(value for value in passed if isinstance(value, torch.Tensor))
            calls.append(ModuleCall(name, module, taken, given, given.clone(), tensors))

    return record


def _first_float(values: Any) -> torch.Tensor | None:
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected number."""
    expected = expected.detach().float()
    distance = (found.detach().float() - expected).abs().max()
    return float(distance / expected.abs().max().clamp(min=1e-30))


def scales(config: PreTrainedConfig) -> list[float]:
    """List 1 and the factors in a configuration with their inverses; families name them freely."""
    found = [1.0]
    for name, value in config.to_dict().items():
        if any(word in name for word in ("scal", "multiplier")):
            for number in value if isinstance(value, list | tuple) else [value]:
                if type(number) in {int, float} and number > 0:
                    found += [float(number), 1 / float(number)]
    return list(dict.fromkeys(found))


def solved_factors(
    added: torch.Tensor, columns: torch.Tensor, known: Sequence[float], tolerance: float
) -> list[float | None]:
    """Solve `columns factors = added` by least squares; return the `known` number nearest to each.

    `added` is `[n]`, `columns` `[n, k]`, both in float64 and finite. A factor is None if no known
    number is within `tolerance` of it, relative to that number.
    """
    sizes = columns.norm(dim=0)
    unit = columns / sizes
    # The normal equations: there are a few columns, and thousands of rows.
    solved = torch.linalg.pinv(unit.T @ unit, hermitian=True) @ (unit.T @ added) / sizes
    found = []
    for factor in solved.tolist():
        near = min(known, key=lambda number: abs(number - factor))
        found.append(near if abs(near - factor) <= tolerance * near else None)
    return found


def read_norm(call: ModuleCall) -> Norm:
    """Map a norm: the candidate formula that reproduces the module's output.

    Raises `ModelFailed` if neither LayerNorm nor RMSNorm, with weight, 1 + weight or none, does.
    """
    module = call.module
    stored = getattr(module, "weight", None)
    weight = torch.ones(call.output.shape[-1], device=call.output.device)
    if stored is not None:
        weight = stored.detach().float()
    bias = getattr(module, "bias", None)
    offset = None if bias is None else bias.detach().float()
    for centred in (isinstance(module, nn.LayerNorm), not isinstance(module, nn.LayerNorm)):
        for multiplier in (weight, 1 + weight):
            norm = Norm(multiplier, offset, epsilon(module), centred)
            if _gives(norm, call):
                return norm
    raise ModelFailed(f"{call.name} computes neither a LayerNorm nor an RMSNorm")


def epsilon(module: nn.Module) -> float:
    """Return a norm's epsilon, which families name differently."""
    names = ("eps", "variance_epsilon", "epsilon", "norm_eps")
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    raise ModelFailed(f"{type(module).__name__} has no epsilon: expected it as {', '.join(names)}")


def _gives(norm: Norm, call: ModuleCall) -> bool:
    return difference(norm(call.input), call.output) <= TOLERANCE[call.output.dtype]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: it has one weight vector or none, and is named a norm."""
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower() and not list(module.children())
    return named and (weight is None or (isinstance(weight, torch.Tensor) and weight.dim() == 1))

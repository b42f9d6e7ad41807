"""Find the MLP of a block, dense or a mixture of experts, in an observed pass.

A gated MLP is recognised by its neurons, which gate, up and an activation function must reproduce.
A mixture is recognised by its result, to which the results of its experts must add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from januslens_server.capture import End, Tap
from januslens_server.capture.hooks import Columns, rows, select
from januslens_server.errors import ModelFailed
from januslens_server.graph.mlp import Activation, Expert
from januslens_server.models.adapters.observed_pass import (
    TOLERANCE,
    ModuleCall,
    difference,
    is_norm,
    same_memory,
    scales,
)
from januslens_server.models.experts import Experts, LatentExperts, SharedExpert
from januslens_server.models.matrices import Linear
from januslens_server.models.views import Mlp

# Modules of torch and transformers that compute activation functions.
ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")
# Activation functions that models call without a module and without a name in the configuration.
USUAL_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "sigmoid")
# Factor of either summand where a model averages routed and shared experts.
HALF = 0.5


@dataclass(frozen=True)
class FoundMlp:
    """The MLP of a block: its parts, what it reads and the call that gives its result.

    `reader` is the module that reads `input`. `result.output` is the sum of the MLP's parts, which
    is the input of a norm if the module ends with one. `name` is that of the module that contains
    the whole MLP; for a dense MLP it is empty.
    """

    parts: Mlp | Experts
    input: torch.Tensor
    reader: nn.Module
    result: ModuleCall
    name: str = ""


def linear(call: ModuleCall, columns: Columns | None = None) -> Linear:
    """Map the linear module of a call, or some of its output columns."""
    return Linear(call.module, isinstance(call.module, Conv1D), columns, call.overwritten)


def is_linear(call: ModuleCall) -> bool:
    """Whether a call is one of a linear module."""
    return isinstance(call.module, nn.Linear | Conv1D)


@torch.no_grad()
def dense_mlp(
    maps: Sequence[ModuleCall], calls: Sequence[ModuleCall], config: PreTrainedConfig
) -> FoundMlp:
    """Map an MLP of two or three linear maps; `calls` are all of its block.

    Raises:
        ModelFailed: It seems to be gated, but its neurons are not those of a gated MLP.
    """
    first, *_, down = maps
    parts = Mlp(ff1=linear(first), ff2=linear(down))
    if len(maps) == 3 or first.output.shape[-1] != down.input.shape[-1]:
        gated = _gated(maps, calls, config)
        parts = Mlp(ff1=gated.gate, up=gated.up, ff2=linear(down))
    return FoundMlp(parts, first.input, first.module, down)


@torch.no_grad()
def activation_between(
    maps: Sequence[ModuleCall], calls: Sequence[ModuleCall], config: PreTrainedConfig
) -> nn.Module | None:
    """Return the activation function whose result the second of two maps reads, or None."""
    first, neurons = rows(maps[0].output).float(), rows(maps[1].input)
    if first.shape != neurons.shape:
        return None
    for function in _activations(calls, config):
        if difference(function(first), neurons) <= TOLERANCE[neurons.dtype]:
            return function
    return None


@torch.no_grad()
def find_experts(
    block: str, calls: Sequence[ModuleCall], config: PreTrainedConfig
) -> FoundMlp | None:
    """Find a mixture of experts among the calls inside a block; None without experts.

    Raises:
        ModelFailed: The experts are stored or added up in an unknown way.
    """
    call = next((call for call in calls if _stacks_experts(call.module)), None)
    if call is None:
        return None
    name = call.name.rpartition(".")[0]
    whole = next((other for other in calls if other.name == name), None)
    if name == block or whole is None:
        raise ModelFailed(f"{call.name} is not inside a module that computes the whole MLP")
    inside = [other for other in calls if other.name.startswith(f"{name}.")]
    down, up = _latent_maps(call, whole, inside)
    experts = _routed(whole, call, inside)
    if down is not None and up is not None:
        experts = replace(experts, latent=LatentExperts(linear(down), linear(up)))
    maps = [
        other
        for other in inside
        if is_linear(other) and other.output.shape[-1] != experts.count and other not in (down, up)
    ]
    result, norm = whole, _norm_at_end(whole, inside)
    if norm is not None:
        experts = replace(experts, norm=norm.module)
        result = replace(whole, output=norm.input, given=norm.input)
    experts = _added_up(experts, result, up or call, maps, calls, config)
    return FoundMlp(experts, whole.input, whole.module, result, name)


@torch.no_grad()
def with_shared_outside(
    found: FoundMlp,
    maps: Sequence[ModuleCall],
    calls: Sequence[ModuleCall],
    config: PreTrainedConfig,
) -> FoundMlp:
    """Add a shared expert of these linear maps, whose result is added outside of the mixture.

    Raises:
        ModelFailed: The maps are not those of a shared expert.
    """
    experts = found.parts
    reads = difference(rows(maps[0].input), rows(found.input)) <= TOLERANCE[found.input.dtype]
    if not isinstance(experts, Experts) or experts.shared is not None or not reads:
        raise ModelFailed(f"{maps[0].name} is not part of a shared expert")
    shared = _shared(maps, calls, config)
    return replace(found, parts=replace(experts, shared=shared, beside=shared.ff2.output))


def stacked_experts(module: Any, block: nn.Module, router: nn.Module | None) -> Experts:
    """Map experts in 3-D parameters, in the layout that transformers declares for the module."""
    transposed, concatenated = module.is_transposed, module.is_concatenated
    if not module.has_gate:
        return Experts(
            block=block,
            module=module,
            router=router,
            stored_as_rows=transposed,
            gate=None,
            up=None,
            activation=module.act_fn,
            ff1_name="up_proj",
        )
    width = module.down_proj.shape[1 if transposed else 2]
    both = range(2 * width)
    gate, up = (both[:width], both[width:]) if concatenated else (both[::2], both[1::2])

    def activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack([gate, up], -1)
        stored = (pairs.transpose(-1, -2) if concatenated else pairs).flatten(-2)
        neurons: torch.Tensor = module._apply_gate(stored)  # noqa: SLF001 - no public name
        return neurons

    return Experts(
        block=block,
        module=module,
        router=router,
        stored_as_rows=transposed,
        gate=gate,
        up=up,
        activation=activation,
    )


def _stacks_experts(module: nn.Module) -> bool:
    """Whether a module has the experts' matrices in 3-D parameters."""
    own = dict(module.named_parameters(recurse=False))
    return "down_proj" in own and own["down_proj"].dim() == 3


def _norm_at_end(whole: ModuleCall, inside: Sequence[ModuleCall]) -> ModuleCall | None:
    """Return the call of the norm whose result the MLP returns, or None (A.X K1 has one)."""
    norms = (call for call in inside if is_norm(call.module))
    return next((call for call in norms if same_memory(call.output, whole.output)), None)


def _latent_maps(
    call: ModuleCall, whole: ModuleCall, inside: Sequence[ModuleCall]
) -> tuple[ModuleCall | None, ModuleCall | None]:
    """Return the calls of the linear maps before and after the experts' module, if it has both."""
    maps = [other for other in inside if is_linear(other)]
    for down in maps:
        if not same_memory(down.output, call.input) or not same_memory(down.input, whole.input):
            continue
        for up in maps:
            if same_memory(up.input, call.output) and up.output.shape[-1] == whole.output.shape[-1]:
                return down, up
    return None, None


def _routed(whole: ModuleCall, call: ModuleCall, inside: Sequence[ModuleCall]) -> Experts:
    """Map the routed experts; their results must add up to what their module returned."""
    if hasattr(call.module, "has_gate") and len(call.tensors) == 3:
        experts = stacked_experts(call.module, whole.module, None)
    else:
        experts = _with_weighted_inputs(whole, call, inside)
    found = torch.zeros_like(call.output, dtype=torch.float32)
    for index in range(experts.count):
        one = experts.call(call.tensors, index)
        if len(one.positions):
            result = _result(experts.expert(index), one.x)
            found.index_add_(0, one.rows, one.weights * result)
    error = difference(found, call.output)
    if not error <= TOLERANCE[call.output.dtype]:
        raise ModelFailed(
            f"the experts of {call.name} do not add up to its result (relative error {error:.2g})"
        )
    return replace(experts, router=_router(inside, experts.count))


def _with_weighted_inputs(
    whole: ModuleCall, call: ModuleCall, inside: Sequence[ModuleCall]
) -> Experts:
    """Map the experts of Llama 4, which read the MLP's input times the router's weights."""
    module: Any = call.module
    x, count = rows(whole.input), module.down_proj.shape[0]
    for other in inside:
        if len(call.tensors) != 1 or other.output.shape != (len(x), count):
            continue
        read = (other.output.T[:, :, None] * x).flatten(0, 1)
        if difference(read, call.input) > TOLERANCE[x.dtype]:
            continue
        width = module.down_proj.shape[1]
        return Experts(
            block=whole.module,
            module=module,
            router=None,
            stored_as_rows=True,
            gate=range(width),
            up=range(width, 2 * width),
            activation=_times(module.act_fn),
            scores=Tap(other.module, End.OUTPUT),
            per_token=int((other.output > 0).sum(-1).max()),
        )
    raise ModelFailed(f"{call.name} stores or calls its experts in an unknown way")


def _result(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    down = expert.neurons(x) @ expert.ff2
    return down if expert.ff2_bias is None else down + expert.ff2_bias


def _router(inside: Sequence[ModuleCall], count: int) -> nn.Module | None:
    """Return the outermost module that returns the logits of its weight, or None."""
    for call in reversed(inside):
        weight = getattr(call.module, "weight", None)
        if not isinstance(weight, torch.Tensor) or call.output.shape[-1] != count:
            continue
        if weight.shape != (count, call.input.shape[-1]):
            continue
        bias = getattr(call.module, "bias", None)
        logits = functional.linear(
            rows(call.input).float(), weight.float(), None if bias is None else bias.float()
        )
        if difference(logits, rows(call.output)) <= TOLERANCE[call.input.dtype]:
            return call.module
    return None


def _added_up(
    experts: Experts,
    whole: ModuleCall,
    call: ModuleCall,
    maps: Sequence[ModuleCall],
    calls: Sequence[ModuleCall],
    config: PreTrainedConfig,
) -> Experts:
    """Add the shared expert among the other linear `maps` of the MLP, and both multipliers.

    They must give what the MLP returns; `call` gives the sum of the routed experts' results.
    """
    opening = next((other for other in maps if other.output.shape[-1] == 1), None)
    maps = [other for other in maps if other is not opening]
    routed, expected = rows(call.output).float(), rows(whole.output).float()
    routed = routed.unflatten(0, (-1, len(expected))).sum(0)  # Llama 4 adds the experts outside
    factors = [*scales(config), HALF]
    errors: dict[tuple[float, float], float] = {}
    shared = torch.zeros_like(expected)
    if maps and maps[-1].given.shape[-1] != expected.shape[-1]:
        raise ModelFailed(
            f"{maps[-1].name} returns vectors of width {maps[-1].given.shape[-1]}: expected "
            f"{expected.shape[-1]}, the result of a shared expert"
        )
    if maps:
        shared = rows(maps[-1].given).float()
        if opening is not None:
            shared = shared * rows(opening.output).float().sigmoid()
    for one, other in product(factors, factors if maps else [1.0]):
        errors[one, other] = difference(one * routed + other * shared, expected)
    (one, other), error = min(errors.items(), key=lambda item: item[1])
    if not error <= TOLERANCE[whole.output.dtype]:
        raise ModelFailed(
            f"routed and shared experts do not add up to the result of {whole.name} (relative "
            f"error {error:.2g})"
        )
    experts = replace(experts, multiplier=one)
    if not maps:
        return experts
    found = replace(
        _shared(maps, calls, config),
        multiplier=other,
        opening=None if opening is None else linear(opening),
    )
    return replace(experts, shared=found)


def _shared(
    maps: Sequence[ModuleCall], calls: Sequence[ModuleCall], config: PreTrainedConfig
) -> SharedExpert:
    """Map a shared expert of two or three linear maps; it is gated unless two are enough.

    Raises:
        ModelFailed: No activation function reproduces its neurons.
    """
    if len(maps) == 2:
        activation = activation_between(maps, calls, config)
        if activation is not None:
            return SharedExpert(linear(maps[0]), None, linear(maps[1]), activation)
    gated = _gated(maps, calls, config)
    return SharedExpert(gated.gate, gated.up, linear(maps[-1]), gated.activation)


class _Gated(NamedTuple):
    """Gate and up of a gated MLP, and its activation function."""

    gate: Linear
    up: Linear
    activation: Activation


def _gated(
    maps: Sequence[ModuleCall], calls: Sequence[ModuleCall], config: PreTrainedConfig
) -> _Gated:
    """Find out which of a gated MLP's maps, or columns of its fused map, are the gate.

    Raises:
        ModelFailed: No candidate reproduces the neurons.
    """
    neurons = rows(maps[-1].input)
    errors: list[tuple[float, _Gated]] = []
    functions, factors = list(_activations(calls, config)), scales(config)
    for gate, up in _pairs(maps):
        gates, ups = (select(rows(call.output), own.columns).float() for call, own in (gate, up))
        for function, factor in product(functions, factors):
            candidate = _Gated(gate[1], up[1], _times(function, factor))
            errors.append((difference(candidate.activation(gates, ups), neurons), candidate))
    names = " and ".join(call.name for call in maps[:-1])
    if not errors:
        raise ModelFailed(f"{names} are not gate and up of a gated MLP")
    error, found = min(errors, key=lambda pair: pair[0])
    if not error <= TOLERANCE[neurons.dtype]:
        raise ModelFailed(
            f"the neurons behind {names} are not those of a gated MLP (relative error {error:.2g})"
        )
    return found


def _pairs(maps: Sequence[ModuleCall]) -> Iterator[tuple[tuple[ModuleCall, Linear], ...]]:
    """Yield candidates for gate and up: two maps, or halves or alternating columns of one."""
    if len(maps) == 3:
        one, other = ((call, linear(call)) for call in maps[:2])
        yield from ((one, other), (other, one))
    if len(maps) != 2 or maps[0].output.shape[-1] != 2 * maps[1].input.shape[-1]:
        return
    both = range(maps[0].output.shape[-1])
    half = len(both) // 2
    for columns in ((both[:half], both[half:]), (both[::2], both[1::2])):
        one, other = ((maps[0], linear(maps[0], part)) for part in columns)
        yield from ((one, other), (other, one))


def _activations(calls: Sequence[ModuleCall], config: PreTrainedConfig) -> Iterator[nn.Module]:
    """Yield the activation functions that a block may use, called modules first."""
    for call in calls:
        if type(call.module).__module__ in ACTIVATION_MODULES:
            yield call.module
    named = [value for name, value in config.to_dict().items() if "act" in name]
    for name in dict.fromkeys([*named, *USUAL_ACTIVATIONS]):
        if isinstance(name, str) and name in ACT2FN:
            yield ACT2FN[name]


def _times(function: nn.Module, factor: float = 1.0) -> Activation:
    def activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        neurons: torch.Tensor = function(gate if factor == 1.0 else gate * factor) * up
        return neurons

    return activation

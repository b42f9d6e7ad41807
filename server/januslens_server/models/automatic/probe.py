"""One forward pass, watched: which module took and gave which tensors, in which order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

PROBE_LENGTH = 6


@dataclass(frozen=True)
class Event:
    """One call of a module: the first tensors in and out, `[batch, pos, ...]`."""

    name: str
    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """The calls of one forward pass, in the order in which they ended."""

    events: tuple[Event, ...]

    def inside(self, prefix: str) -> list[Event]:
        """The calls of the modules below the one named `prefix`."""
        return [event for event in self.events if event.name.startswith(f"{prefix}.")]

    def of(self, module: nn.Module) -> Event | None:
        """The call of a module, if it was called."""
        return next((event for event in self.events if event.module is module), None)


def probe_ids(network: PreTrainedModel) -> torch.Tensor:
    """Tokens `[1, pos]` spread over the vocabulary."""
    vocab_size = network.get_input_embeddings().get_parameter("weight").shape[0]
    device = network.device if network.device.type != "meta" else None  # offloaded: it is moved
    steps = torch.arange(PROBE_LENGTH, device=device)
    return (steps * max(1, vocab_size // PROBE_LENGTH) % vocab_size)[None]


@torch.inference_mode()
def run_probe(network: PreTrainedModel) -> Probe:
    """Run the probe's tokens through the model, watching every module."""
    events: list[Event] = []
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            handle = module.register_forward_hook(_recorder(name, events), with_kwargs=True)
            hooks.callback(handle.remove)
        network(input_ids=probe_ids(network), use_cache=False)
    return Probe(tuple(events))


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same one, or views of it: how data flow is recognised."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _recorder(name: str, events: list[Event]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
        taken = _first_float([*args, *named.values()])
        given = _first_float(output if isinstance(output, tuple | list) else [output])
        if taken is not None and given is not None:
            events.append(Event(name, module, taken, given))

    return record


def _first_float(values: Any) -> torch.Tensor | None:
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None

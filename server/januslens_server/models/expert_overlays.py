"""Changes of routed experts in a forward pass: of their matrices, and of their neurons.

The models' own kernels compute all experts at once, so what a change adds to an expert's result is
computed beside them and added to what their module returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from januslens_server.capture import LowRank, NeuronChange
from januslens_server.models.experts import HIDDEN_OF, Experts
from januslens_server.results import MatrixKind

# Changes of matrices by expert and kind.
ExpertChanges = dict[int, dict[MatrixKind, LowRank]]


@dataclass(frozen=True)
class ExpertOverlay:
    """Overlay that changes matrices of some routed experts of one MLP.

    An expert is not linear in its first matrices. What a change adds to its result is therefore the
    difference of two runs, on the positions that are routed to it. `neuron_change` is what
    interventions do to the neurons of both runs.
    """

    layer: int
    experts: Experts
    changes: ExpertChanges
    neuron_change: NeuronChange | None = None

    @property
    def module(self) -> nn.Module:
        """The module that contains all routed experts of the MLP."""
        return self.experts.module

    def over(self, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """What the module returns, with the changes applied."""
        return _with_moved(self.experts, args, output, self.changes, self._moved)

    def _moved(self, index: int, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Difference that the changes make to one expert's result for `x` `[n, d_in]`."""
        expert, changes = self.experts.expert(index), self.changes[index]
        hidden = expert.hidden(x)
        before = expert.activation(*hidden)
        for kind, change in changes.items():
            if kind in HIDDEN_OF:
                hidden[HIDDEN_OF[kind]] = hidden[HIDDEN_OF[kind]] + change.times(x)
        after = expert.activation(*hidden)
        if self.neuron_change is not None:
            before, after = (self.neuron_change(index, positions, n) for n in (before, after))
        moved = (after - before) @ expert.ff2
        if MatrixKind.FF2 in changes:
            moved = moved + changes[MatrixKind.FF2].times(after)
        return moved


@dataclass(frozen=True)
class NeuronOverlay:
    """Overlay that changes neurons of the routed experts `numbers` of one MLP.

    The models' own kernels do not return the neurons. So they are computed again, and what the
    change adds to the experts' results is added.
    """

    experts: Experts
    numbers: Sequence[int]
    change: NeuronChange

    @property
    def module(self) -> nn.Module:
        """The module that contains all routed experts of the MLP."""
        return self.experts.module

    def over(self, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """What the module returns, with the neurons changed."""
        return _with_moved(self.experts, args, output, self.numbers, self._moved)

    def _moved(self, index: int, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        expert = self.experts.expert(index)
        neurons = expert.neurons(x)
        return (self.change(index, positions, neurons) - neurons) @ expert.ff2


def _with_moved(
    experts: Experts,
    args: tuple[Any, ...],
    output: torch.Tensor,
    numbers: Iterable[int],
    moved: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Add differences to what the experts' module returned for its arguments.

    `moved` returns the difference of one expert's result, given its number, the positions that are
    routed to it and their inputs in float32.
    """
    added = torch.zeros(output.shape, device=output.device)
    for index in numbers:
        call = experts.call(args, index)
        if len(call.positions):
            own = call.weights * moved(index, call.positions, call.x)
            added = added.index_add(0, call.rows, own)
    return output + added.to(output.dtype)

"""The experts of an MLP: their matrices, captured routing and gradients.

transformers stores the routed experts of a layer in 3-D parameters instead of linear modules. A
shared expert, which every position uses, consists of linear modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from januslens_server.capture import End, NeuronChange, Routing, Tap
from januslens_server.capture.hooks import Columns, nth_tensor, rows, select
from januslens_server.graph.mlp import Activation, Expert, ExpertMlp
from januslens_server.graph.weights import Finish
from januslens_server.models.matrices import Factors, Linear, read_parameter, read_tensor
from januslens_server.results import MatrixKind
from januslens_server.transfer import to_device, to_host


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every position uses beside the routed ones; it is gated if `up` is set.

    Its weight is `multiplier`, times the sigmoid of what the linear map `opening` `[d_model, 1]`
    returns if there is one.
    """

    ff1: Linear
    up: Linear | None
    ff2: Linear
    activation: Activation
    multiplier: float = 1.0
    opening: Linear | None = None

    @property
    def matrices(self) -> dict[MatrixKind, Linear]:
        """Weight matrices by kind."""
        if self.up is None:
            return {MatrixKind.FF1: self.ff1, MatrixKind.FF2: self.ff2}
        return {MatrixKind.GATE: self.ff1, MatrixKind.UP: self.up, MatrixKind.FF2: self.ff2}

    @property
    def taps(self) -> dict[str, Tap]:
        """Tap of what `opening` returns, by the name under which `Experts.routing` takes it."""
        return {} if self.opening is None else {"opening": self.opening.output}

    def weights(self, opening: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Return the expert's weight `[pos, 1]`, given what `opening` returns.

        `like` `[pos, k]` are the router's weights.
        """
        constant = torch.full_like(like[:, :1], self.multiplier)
        if opening is None:
            return constant
        return constant * opening.reshape(-1, 1).to(like).sigmoid()


@dataclass(frozen=True)
class LatentExperts:
    """Linear maps around routed experts that read and write latent vectors (Nemotron-H).

    `down` maps what the MLP reads to the experts' inputs, `up` the weighted sum of their results to
    what the MLP adds.
    """

    down: Linear
    up: Linear


@dataclass(frozen=True)
class ExpertCall:
    """One call of an expert's module, as far as it concerns one expert.

    The expert reads `x` `[n, d_in]` in float32 at `positions` `[n]`. Its results, times
    `weights` `[n, 1]`, are added to the `rows` `[n]` of what the module returns.
    """

    positions: torch.Tensor
    rows: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in transformers' layout.

    `block` is the whole MLP. `module` has the parameters `ff1_name` and `down_proj`
    `[n_experts, ...]`; its arguments are the hidden states `[pos, d_in]`, the experts `[pos, k]`
    and their weights `[pos, k]`. Of gated experts, `gate` and `up` are column ranges of the fused
    projection; of others they are None. `router` returns the router's logits first; None if no
    module returns them. The result of `module` is multiplied by `multiplier` before the `shared`
    expert's is added, whose number follows those of the others. `stored_as_rows`, `finish` and
    `added` are as in `Linear` and `Mlp`.

    In Llama 4 the router's weights multiply what experts read instead of their results. `scores` is
    then the tap of these weights `[pos, n_experts]`, which are 0 for all but `per_token` experts.
    `module` reads and returns `[n_experts * pos, d_model]`, the rows of each expert in turn.

    With `latent` maps, `d_in` is the width of the vectors between them; else it is `d_model`.

    In Granite, the shared expert's result `beside` `[batch, pos, d_model]` is added outside of
    `block`. In A.X K1, `block` ends with a `norm` of the sum of all experts' results.
    """

    block: nn.Module
    module: nn.Module
    router: nn.Module | None
    stored_as_rows: bool
    gate: Columns | None
    up: Columns | None
    activation: Activation
    ff1_name: str = "gate_up_proj"
    multiplier: float = 1.0
    shared: SharedExpert | None = None
    finish: Finish | None = None
    added: Tap | None = None
    scores: Tap | None = None
    per_token: int = 0
    beside: Tap | None = None
    latent: LatentExperts | None = None
    norm: nn.Module | None = None

    @property
    def count(self) -> int:
        """Number of routed experts."""
        return self.module.get_parameter("down_proj").shape[0]

    @property
    def width(self) -> int:
        """Number of neurons of one routed expert."""
        return self.module.get_parameter("down_proj").shape[1 if self.stored_as_rows else 2]

    @property
    def n_neurons(self) -> int:
        """Number of neurons of all experts together."""
        return self.count * self.width + self.n_shared

    @property
    def n_shared(self) -> int:
        """Number of neurons of the shared expert; 0 without one."""
        return 0 if self.shared is None else self.shared.ff2.d_in

    @property
    def input(self) -> Tap:
        """Tap of the MLP's input `[batch, pos, d_model]`."""
        return Tap(self.block, End.INPUT)

    @property
    def output(self) -> Tap:
        """Tap of the weighted sum of the experts' results `[batch, pos, d_model]`."""
        return Tap(self.block, End.OUTPUT) if self.norm is None else Tap(self.norm, End.INPUT)

    @property
    def routing_taps(self) -> dict[str, Tap]:
        """Taps that `routing` needs, by name."""
        taps = {
            "expert_ids": Tap(self.module, End.INPUT, argument=1),
            "expert_weights": Tap(self.module, End.INPUT, argument=2),
        }
        if self.scores is not None:
            taps = {"expert_scores": self.scores}
        return taps if self.shared is None else taps | self.shared.taps

    @property
    def taps(self) -> dict[str, Tap]:
        """Taps that a forward pass captures, by field name of `LayerActivations`."""
        outside = {} if self.beside is None else {"shared_sum": self.beside}
        return {"mlp_input": self.input, "mlp_sum": self.output} | outside | self.routing_taps

    def routing(self, captured: MutableMapping[str, torch.Tensor]) -> Routing:
        """Take the tensors of `routing_taps`; return the experts of each position.

        Those are the routed ones, then the shared one.
        """
        inputs = None
        if self.scores is None:
            ids = captured.pop("expert_ids").detach()
            weights = captured.pop("expert_weights").detach().float() * self.multiplier
        else:
            inputs, ids = captured.pop("expert_scores").detach().float().topk(self.per_token)
            weights = torch.full_like(inputs, self.multiplier)
        if self.shared is None:
            return Routing(ids, weights, inputs)
        opening = captured.pop("opening", None)
        own = self.shared.weights(None if opening is None else opening.detach(), weights)
        shared = torch.full_like(ids[:, :1], self.count)
        return Routing(
            torch.cat([ids, shared], dim=1),
            torch.cat([weights, own], dim=1),
            None if inputs is None else torch.cat([inputs, torch.ones_like(own)], dim=1),
        )

    def call(self, args: Sequence[Any], index: int) -> ExpertCall:
        """Return what the arguments of a call of `module` mean for one routed expert."""
        x = nth_tensor(args)
        if self.scores is not None:  # the rows of positions that are not routed to it are 0
            own = x.unflatten(0, (self.count, -1))[index]
            positions = torch.where(own.any(-1))[0]
            read = own[positions].float()
            rows_of = positions + index * len(own)
            return ExpertCall(positions, rows_of, read, torch.ones_like(read[:, :1]))
        ids, weights = (nth_tensor(args, n=n) for n in (1, 2))
        positions, slots = torch.where(ids == index)
        weight = weights[positions, slots, None].float()
        return ExpertCall(positions, positions, x[positions].float(), weight)

    @property
    def neuron_taps(self) -> tuple[Tap, Tap]:
        """Taps of the input and of the experts, or their `scores`, that `neurons` needs."""
        if self.scores is not None:
            return self.input, self.scores
        return Tap(self.module, End.INPUT), Tap(self.module, End.INPUT, argument=1)

    def neurons(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        experts: Sequence[int],
        at: torch.Tensor,
        change: NeuronChange | None,
    ) -> torch.Tensor:
        """Return the neurons of routed experts `[pos, experts, d_mlp]` in float32.

        They are 0 where a position is not routed to the expert. `x` `[pos, d_model]` and `chosen`
        are the tensors of `neuron_taps` at the positions `at` `[pos]`; `change` is that of
        interventions.
        """
        found = torch.zeros(len(x), len(experts), self.width, device=x.device)
        for column, index in enumerate(experts):
            scores = None if self.scores is None else chosen[:, index, None].float()
            routed = (chosen == index).any(-1) if scores is None else scores[:, 0] > 0
            rows_of = torch.where(routed)[0]
            if len(rows_of):
                read = x[rows_of].float() if scores is None else x[rows_of] * scores[rows_of]
                own = self.expert(index).neurons(read)
                own = own if change is None else change(index, at[rows_of], own)
                found[rows_of, column] = own
        return found

    @property
    def matrices(self) -> dict[MatrixKind, ExpertMatrices]:
        """Weight matrices by kind, each for all experts."""
        gated = (MatrixKind.GATE, MatrixKind.UP, MatrixKind.FF2)
        kinds = (MatrixKind.FF1, MatrixKind.FF2) if self.up is None else gated
        return {kind: ExpertMatrices(self, kind) for kind in kinds}

    @property
    def linears(self) -> list[Linear]:
        """All linear modules: those of the shared expert and around the routed ones."""
        latent = [] if self.latent is None else [self.latent.down, self.latent.up]
        if self.shared is None:
            return latent
        opening = [] if self.shared.opening is None else [self.shared.opening]
        return [*latent, *self.shared.matrices.values(), *opening]

    def mlp(self) -> ExpertMlp:
        """The experts in the form that the flow graph reads."""
        bias = None
        if self.latent is not None and self.latent.up.bias is not None:
            bias = self.latent.up.bias.float() * self.multiplier
        return ExpertMlp(self.expert_of_residual, self.finish, bias)

    def expert(self, index: int) -> Expert:
        """One expert's weights in float32, as they are stored."""
        matrices = self.matrices
        first, *ups, last = matrices.values()
        up = ups[0] if ups else None
        of_shared = self.shared is not None and index == self.count
        return Expert(
            ff1=first.weight_of(index).float(),
            ff1_bias=first.bias_of(index),
            up=None if up is None else up.weight_of(index).float(),
            up_bias=None if up is None else up.bias_of(index),
            ff2=last.weight_of(index).float(),
            ff2_bias=last.bias_of(index),
            activation=self.shared.activation if self.shared and of_shared else self.activation,
        )

    def expert_of_residual(self, index: int) -> Expert:
        """One expert's weights in the residual basis, multiplied by those of the latent maps.

        The bias of `latent.up` is that of the whole mixture and not included.
        """
        own = self.expert(index)
        if self.latent is None or index == self.count:
            return own
        down, up = self.latent.down, self.latent.up
        biases = [own.ff1_bias, own.up_bias]
        if down.bias is not None:
            maps = [own.ff1, own.up]
            biases = [
                None if weight is None else down.bias.float() @ weight + (0 if b is None else b)
                for weight, b in zip(maps, biases, strict=True)
            ]
        return replace(
            own,
            ff1=down.weight.float() @ own.ff1,
            ff1_bias=biases[0],
            up=None if own.up is None else down.weight.float() @ own.up,
            up_bias=biases[1],
            ff2=own.ff2 @ up.weight.float(),
            ff2_bias=None if own.ff2_bias is None else own.ff2_bias @ up.weight.float(),
        )

    def value_rows(self) -> Iterator[torch.Tensor]:
        """Yield what neurons write to the residual stream `[d_mlp, d_model]`, expert by expert."""
        stored = self.matrices[MatrixKind.FF2].weights()
        for index, own in enumerate(stored):
            latent = None if index == self.count else self.latent
            yield own if latent is None else own.float() @ latent.up.weight.float()


# Which result of `Expert.hidden` a matrix gives.
HIDDEN_OF = {MatrixKind.FF1: 0, MatrixKind.GATE: 0, MatrixKind.UP: 1}


@dataclass(frozen=True)
class ExpertMatrices:
    """One kind of matrix for all experts of a layer.

    `change` is what interventions do to the neurons of the pass that `factors` belong to.
    """

    experts: Experts
    kind: MatrixKind
    change: NeuronChange | None = None

    @property
    def whole(self) -> Tap:
        """Tap of the MLP's output; the factors are computed from its VJPs."""
        return self.experts.output

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Taps that `factors` needs."""
        latent = self.experts.latent
        between = () if latent is None else (latent.down.output,)
        return (self.experts.input, self.whole, *between, *self.experts.routing_taps.values())

    @property
    def in_residual_basis(self) -> bool:
        """Whether the routed experts read and write the residual basis, not latent vectors."""
        return self.experts.latent is None

    @property
    def module(self) -> nn.Module:
        """The module that contains the matrices of the routed experts."""
        return self.experts.module

    def number(self, expert: int | None) -> int:
        """Return the expert of a `MatrixKey`. Raises `ValueError` if it is None."""
        if expert is None:
            raise ValueError("the expert's number is missing")
        return expert

    def linear(self, expert: int | None) -> Linear | None:
        """Return the linear map of the shared expert; None for the number of a routed one."""
        shared = self.experts.shared
        if shared is None or self.number(expert) != self.experts.count:
            return None
        return shared.matrices[self.kind]

    def parameter(self) -> torch.Tensor:
        """The model's parameter `[n_experts, ...]` that contains the routed experts' matrices."""
        return read_parameter(self.module, self._name)

    def rows_of(self, stored: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """One routed expert's `[d_in, d_out]` in a tensor with the parameter's layout."""
        own = stored[self.number(expert)]
        return select(own if self.experts.stored_as_rows else own.T, self._columns)

    def weights(self) -> Iterator[torch.Tensor]:
        """Yield `W: [d_in, d_out]` of each expert in the order of their numbers."""
        stored = self.parameter()
        for expert in range(self.experts.count):
            yield self.rows_of(stored, expert)
        if self.experts.shared is not None:
            yield self.experts.shared.matrices[self.kind].weight

    def weight_of(self, expert: int) -> torch.Tensor:
        """`W: [d_in, d_out]` of one expert, a view of the model's parameter."""
        linear = self.linear(expert)
        return self.rows_of(self.parameter(), expert) if linear is None else linear.weight

    def bias_of(self, expert: int) -> torch.Tensor | None:
        """`b: [d_out]` of one expert in float32, or None."""
        linear = self.linear(expert)
        if linear is not None:
            return None if linear.bias is None else linear.bias.float()
        bias = read_tensor(self.module, f"{self._name}_bias")
        return None if bias is None else select(bias[expert], self._columns).float()

    def factors(
        self, captured: Mapping[Tap, torch.Tensor], vjps: torch.Tensor
    ) -> dict[int | None, Factors]:
        """Factors by routed expert, from dL/d(MLP output) `[pos, d_model]`.

        The VJPs contain the router's weight, the inputs do not, unless the weight multiplies what
        an expert reads (docs/semantics.md).
        """
        x, latent = rows(captured[self.experts.input]).detach(), self.experts.latent
        read, own = x, vjps
        if latent is not None:
            read = rows(captured[latent.down.output]).detach()
            own = vjps @ latent.up.weight.float().T
        named = {name: captured[tap] for name, tap in self.experts.routing_taps.items()}
        routing = self.experts.routing(named)
        chosen = to_host(routing.experts)[0].numpy()  # waits once for all experts
        return {
            expert: self._factors(
                expert,
                np.argwhere(chosen == expert),
                *((x, vjps) if expert == self.experts.count else (read, own)),
                routing,
            )
            for expert in np.unique(chosen).tolist()
        }

    def _factors(
        self,
        index: int,
        routed: NDArray[np.int64],
        x: torch.Tensor,
        vjps: torch.Tensor,
        routing: Routing,
    ) -> Factors:
        """Run one expert again, forward and backward, at the positions and slots `routed`."""
        positions, slots = to_device(routed, x.device).unbind(-1)
        expert = self.experts.expert(index)
        own = routing.read(x[positions], positions, slots)
        delta = vjps[positions] * routing.weights[positions, slots, None]
        with torch.enable_grad():
            hidden = [v.detach().requires_grad_() for v in expert.hidden(own.float())]
            neurons = expert.activation(*hidden)
            if self.change is not None:
                neurons = self.change(index, positions, neurons)
            if neurons.requires_grad:
                hidden_vjps = torch.autograd.grad(neurons, hidden, delta @ expert.ff2.T)
            else:  # interventions replace all neurons
                hidden_vjps = tuple(torch.zeros_like(v) for v in hidden)
        if self.kind is MatrixKind.FF2:
            return Factors(neurons.detach(), delta, positions)
        return Factors(own, hidden_vjps[HIDDEN_OF[self.kind]], positions)

    @property
    def _name(self) -> str:
        return "down_proj" if self.kind is MatrixKind.FF2 else self.experts.ff1_name

    @property
    def _columns(self) -> Columns | None:
        if self.kind is MatrixKind.FF2:
            return None
        return self.experts.up if self.kind is MatrixKind.UP else self.experts.gate

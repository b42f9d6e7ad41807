"""Map a block of known parts: attention and MLP, their norms and their places in the block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig

from januslens_server.capture import End, Rotation, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.weights import Finish, QueryScaling, Scoring
from januslens_server.models.adapters.observed_attention import AttentionFinder
from januslens_server.models.adapters.observed_mlp import (
    FoundMlp,
    activation_between,
    dense_mlp,
    find_experts,
    is_linear,
    linear,
    with_shared_outside,
)
from januslens_server.models.adapters.observed_modules import is_multiple, kind_of_mixer
from januslens_server.models.adapters.observed_pass import (
    Choice,
    ModuleCall,
    ObservedPass,
    difference,
    is_norm,
    read_norm,
    same_memory,
    scales,
    solved_factors,
)
from januslens_server.models.adapters.observed_sum import FACTOR, multipliers
from januslens_server.models.views import Attention, Block, Sublayer
from januslens_server.results import SublayerKind


@dataclass(frozen=True)
class BlockSettings:
    """Properties of a block that come from the configuration, because no tensor shows them."""

    n_heads: int
    soft_cap: float | None
    query_scaling: QueryScaling | None
    residual_multiplier: float
    window: int | None = None
    chunk: int | None = None


class BlockFinder:
    """Map one block from the calls of its modules in an observed pass."""

    def __init__(
        self, name: str, module: nn.Module, observed: ObservedPass, config: PreTrainedConfig
    ) -> None:
        """Find the linear maps. `name` is the block's name in the model.

        Raises `ModelFailed` if the block was not called or has other linear maps than expected.
        """
        self._name = name
        self._module = module
        self._known_factors = scales(config)
        self._calls = observed.inside(name)
        self._choice = self._find_choice(observed)
        block = observed.of(module)
        if block is None:
            raise ModelFailed(f"{name} is not called in a forward pass")
        self._input, self._output = block.input, block.output
        self._mixers = self._mixers_beside_attention()
        self._attention, self._mlp, self._others = self._split(config)
        self._check_widths()
        without_latent = self._attention is not None and not self._attention.latent
        if self._choice is not None and without_latent:
            raise ModelFailed(
                f"{self._choice.name} chooses the sources of attention: expected attention with "
                "latent vectors"
            )

    def _check_widths(self) -> None:
        """Raise `ModelFailed` unless attention and MLP read and return vectors of d_model.

        Attention of Zamba also reads the token's embedding.
        """
        width = self._input.shape[-1]
        for part, name in ((self._attention, "attention"), (self._mlp, "MLP")):
            if part is None:
                continue
            for tensor, verb in ((part.input, "reads"), (part.result.output, "returns")):
                if tensor.shape[-1] != width:
                    raise ModelFailed(
                        f"the {name} of {self._name} {verb} vectors of width {tensor.shape[-1]}: "
                        f"expected {width}, as in the residual stream"
                    )

    def block(
        self,
        settings: BlockSettings,
        rotation: Callable[[int], Rotation] | None,
        layout: int,
    ) -> Block:
        """Build the block, with this `rotation` and `layout` of its attention."""
        multiplier = self._multiplier()
        factors = self._factors(settings, multiplier)
        attention = mlp = None
        attention_prenorm = mlp_prenorm = False
        if self._attention is not None:
            factor = factors[self._attention.result.name]
            attention = self._read_attention(self._attention, settings, factor, rotation, layout)
            attention_prenorm = self._norm_giving(self._attention.input) is not None
        if self._mlp is not None:
            finish, added = self._finish(factors[self._mlp.result.name], self._mlp.result)
            mlp = replace(self._mlp.parts, finish=finish, added=added)
            mlp_prenorm = self._norm_giving(self._mlp.input) is not None
        return Block(
            module=self._module,
            attention=attention,
            mlp=mlp,
            residual_mid=self._residual_mid(),
            attention_prenorm=attention_prenorm,
            mlp_prenorm=mlp_prenorm,
            beside=self._beside(factors),
            multiplier=multiplier,
        )

    def _residual_mid(self) -> Tap | None:
        """Return the tap of the residual between attention and MLP, None if they are parallel."""
        if self._attention is None or self._mlp is None:
            return None
        norm = self._norm_giving(self._mlp.input)
        if same_memory(self._mlp.input, self._attention.input) or (
            norm is not None and same_memory(norm.input, self._input)
        ):
            return None
        return Tap(self._mlp.reader if norm is None else norm.module, End.INPUT)

    def _beside(self, factors: Mapping[str, float]) -> tuple[Sublayer, ...]:
        """Map mixers beside attention, and other linear maps as one sublayer after the MLP.

        The latter adds the result of the last of its maps. `factors` are those of what they add.
        """
        sublayers = []
        for call in [*self._mixers, *self._others[-1:]]:
            mixes = call in self._mixers
            sublayers.append(
                Sublayer(
                    name=call.name.removeprefix(f"{self._name}."),
                    kind=kind_of_mixer(call.module) if mixes else SublayerKind.OTHER,
                    output=self._tap_behind(call),
                    multiplier=factors[call.name],
                    after_mid=not mixes,
                    maps=() if mixes else tuple(linear(each) for each in self._others),
                )
            )
        return tuple(sublayers)

    def _added(self) -> list[ModuleCall]:
        """Return the calls that give what attention, the MLP and other sublayers add."""
        found = [each.result for each in (self._attention, self._mlp) if each is not None]
        return [*found, *self._mixers, *self._others[-1:]]

    def _columns(self) -> torch.Tensor:
        """Return what each sublayer adds, behind a post-norm if it has one `[pos d_model, n]`."""
        added = [(self._behind(call) or call).given.flatten() for call in self._added()]
        return torch.stack([vectors.double() for vectors in added], dim=1)

    def _multiplier(self) -> float:
        """Return what multiplies the sum that the block returns, a number among its tensors."""
        candidates = multipliers(self._module)
        if len(candidates) == 1:
            return candidates[0]
        whole = self._input.flatten() + self._columns().sum(1)
        return min(
            candidates, key=lambda number: difference(number * whole, self._output.flatten())
        )

    def _factors(self, settings: BlockSettings, multiplier: float) -> dict[str, float]:
        """Return the factor of what each sublayer adds, by the name of the module that gives it.

        It is the model's residual multiplier, unless factors of the configuration give what the
        block adds and that one does not.
        """
        calls = self._added()
        residual = settings.residual_multiplier
        usual = {call.name: 1.0 if self._behind(call) else residual for call in calls}
        if not self._mixers:
            return usual
        columns, data_type = self._columns(), self._output.dtype
        added = (self._output.double() / multiplier - self._input.double()).flatten()
        if not (added.isfinite().all() and columns.isfinite().all()):  # the self-check says why
            return usual
        solved = solved_factors(added, columns, self._known_factors, FACTOR[data_type])
        found = zip(usual, solved, strict=True)
        return usual | {name: factor for name, factor in found if factor is not None}

    def layouts(self, settings: BlockSettings) -> int:
        """Return the number of candidates for the layout of attention's linear maps.

        It is 0 in a block without attention.
        """
        return 0 if self._attention is None else len(self._attention.layouts(settings.n_heads))

    def _split(
        self, config: PreTrainedConfig
    ) -> tuple[AttentionFinder | None, FoundMlp | None, list[ModuleCall]]:
        """Split the linear maps into those of attention, those of the MLP, and others.

        Attention comes first. Its maps are in one module, or they are the first four. If others
        follow the MLP, its maps are in one module. Those of mixers beside attention are left out.
        """
        linears = self._linears()
        experts = find_experts(self._name, self._calls, config)
        others: list[ModuleCall] = []
        parents = {_parent(call) for call in linears}
        if experts is None and len(parents) == 1 and self._name not in parents:
            only = self._only_sublayer(linears, config)
            if only is not None:
                return (*only, others)
        if experts is None:
            together = [call for call in linears if _parent(call) == _parent(linears[0])]
            count = len(together) if len(together) in {2, 4, 5} else 4
            if len(together) == 3 and not same_memory(together[0].input, together[2].input):
                count = 3  # one map for keys and values
            attention, rest = linears[:count], linears[count:]
            if len(rest) > 3 and count == len(together):
                mlp = [call for call in rest if _parent(call) == _parent(rest[0])]
                rest, others = rest[: len(mlp)], rest[len(mlp) :]
        else:
            outside = [e for e in linears if not e.name.startswith(f"{experts.name}.")]
            if not outside:
                return None, experts, others
            attention = [call for call in outside if _parent(call) == _parent(outside[0])]
            rest = outside[len(attention) :]
            if len(attention) < 2:
                attention, rest = outside, []
        if len(attention) not in {2, 3, 4, 5} or (experts is None and len(rest) not in {2, 3}):
            found = ", ".join(call.name for call in linears)
            raise ModelFailed(
                f"{self._name} has {len(linears)} linear maps ({found}): expected query, key, "
                "value, output and two or three of an MLP"
            )
        found_attention = AttentionFinder(
            self._name, self._owner(attention), attention, self._calls
        )
        if experts is not None and rest:
            experts = with_shared_outside(experts, rest, self._calls, config)
        return found_attention, experts or dense_mlp(rest, self._calls, config), others

    def _find_choice(self, observed: ObservedPass) -> Choice | None:
        """Return the sources that the block's attention reads, as an indexer chose them, or None.

        The indexer is in the block, or the block gets what that of a lower one chose.
        """
        for choice in reversed(observed.choices):
            inside = choice.name.startswith(f"{self._name}.")
            passed = (tensor for call in self._calls for tensor in call.tensors)
            if inside or any(same_memory(tensor, choice.output) for tensor in passed):
                return choice
        return None

    def _linears(self) -> list[ModuleCall]:
        """Return the calls of linear maps outside of an indexer and of mixers beside attention."""
        mixers = [mixer.name for mixer in self._mixers]
        indexer = () if self._choice is None else (f"{self._choice.name}.",)
        return [
            call
            for call in self._calls
            if is_linear(call)
            and self._child(call) not in mixers
            and not call.name.startswith(indexer)
        ]

    def _only_sublayer(
        self, linears: list[ModuleCall], config: PreTrainedConfig
    ) -> tuple[AttentionFinder | None, FoundMlp | None] | None:
        """Map the only sublayer of a block (Nemotron-H), if it is attention or an MLP.

        The neurons of an MLP must be those of an activation function, because a mixer may have as
        many linear maps.
        """
        owner = self._owner(linears)
        kind, widths = kind_of_mixer(owner), {call.output.shape for call in linears[:-1]}
        if kind is SublayerKind.ATTENTION:
            return AttentionFinder(self._name, owner, linears, self._calls), None
        if kind is not SublayerKind.OTHER or widths != {linears[-1].input.shape}:
            return None
        if len(linears) == 2 and activation_between(linears, self._calls, config) is None:
            return None
        return (None, dense_mlp(linears, self._calls, config)) if len(linears) in {2, 3} else None

    def _owner(self, maps: Sequence[ModuleCall]) -> nn.Module:
        """Return the module that contains the first of the maps."""
        return self._module.get_submodule(_parent(maps[0]).removeprefix(f"{self._name}."))

    def _mixers_beside_attention(self) -> list[ModuleCall]:
        """Return the calls of children that mix positions in another way than attention.

        In a block without attention, there are none beside it.
        """
        names = {self._child(call) for call in self._calls if is_linear(call)}
        children = [call for call in self._calls if call.name in names and not is_linear(call)]
        kinds = [kind_of_mixer(call.module) for call in children]
        if SublayerKind.ATTENTION not in kinds:
            return []
        return [
            call
            for call, kind in zip(children, kinds, strict=True)
            if kind not in {SublayerKind.ATTENTION, SublayerKind.OTHER}
        ]

    def _child(self, call: ModuleCall) -> str:
        """Return the name of the block's child that contains a module."""
        return f"{self._name}.{call.name.removeprefix(f'{self._name}.').split('.')[0]}"

    def _read_attention(
        self,
        found: AttentionFinder,
        settings: BlockSettings,
        factor: float,
        rotation: Callable[[int], Rotation] | None,
        layout: int,
    ) -> Attention:
        maps = found.layouts(settings.n_heads)[layout]
        d_head = maps.query.d_out // settings.n_heads
        norms = found.norms(d_head)
        finish, added = self._finish(factor, found.result)
        return Attention(
            query=maps.query,
            key=maps.key,
            value=maps.value,
            output=found.output,
            gate=maps.gate,
            latent=maps.latent,
            chosen=None if self._choice is None else Tap(self._choice.module, End.OUTPUT),
            n_heads=settings.n_heads,
            n_kv_heads=maps.n_kv_heads,
            scoring=Scoring(
                scale=getattr(found.owner, "scaling", None) or d_head**-0.5,
                soft_cap=settings.soft_cap,
                sinks=getattr(found.owner, "sinks", None),
                window=settings.window,
                chunk=settings.chunk,
                query_scaling=settings.query_scaling,
                query_norm=norms.rotated_query,
                key_norm=norms.rotated_key,
            ),
            rotation=partial(_at_end, rotation) if rotation and found.latent else rotation,
            query_map=norms.query_map,
            key_map=norms.key_map,
            query_norm=norms.query_norm,
            key_norm=norms.key_norm,
            value_norm=norms.value_norm,
            value_map=found.value_map(),
            finish=finish,
            added=added,
        )

    def _finish(self, factor: float, result: ModuleCall) -> tuple[Finish | None, Tap | None]:
        """Map a norm that reads a sublayer's result, or the factor of what it adds."""
        norm = self._behind(result)
        if norm is not None:
            return Finish(norm=read_norm(norm)), Tap(norm.module, End.OUTPUT)
        return (None if factor == 1.0 else Finish(multiplier=factor)), None

    def _tap_behind(self, result: ModuleCall) -> Tap:
        """Return the tap of a sublayer's result, behind a norm if one reads it."""
        output = self._behind(result) or result
        return Tap(output.module, End.OUTPUT, overwritten=output.overwritten)

    def _behind(self, result: ModuleCall) -> ModuleCall | None:
        """Return the call of a norm that reads a sublayer's result, or None."""
        for norm in self._norms():
            if same_memory(norm.input, result.output) and norm.input.shape == result.output.shape:
                return norm
        return None

    def _norm_giving(self, tensor: torch.Tensor) -> ModuleCall | None:
        """Return the call of the norm that gives a tensor, or a multiple of it (Falcon-H1)."""
        norms = self._norms()
        given = next((norm for norm in norms if same_memory(norm.output, tensor)), None)
        if given is None and self._mixers:
            given = next((norm for norm in norms if is_multiple(tensor, norm.output)), None)
        return given

    def _norms(self) -> list[ModuleCall]:
        return [call for call in self._calls if is_norm(call.module)]


def _at_end(rotation: Callable[[int], Rotation], length: int) -> Rotation:
    """Rotate the last dimensions of a head instead of the first."""
    return replace(rotation(length), at_end=True)


def _parent(call: ModuleCall) -> str:
    return call.name.rpartition(".")[0]
